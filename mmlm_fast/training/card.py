"""Model cards: what was trained on what, and what it is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm_fast.training.tasks import TASKS


def write_card(folder: Path, result: dict[str, Any], examples: Sequence[dict[str, Any]], model: Any) -> None:
    """Write README.md of a trained model, with the metadata that the hub reads."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    tag = TASKS[result["task"]].pipeline_tag
    numbers = {k: v for k, v in result["metrics"].items() if isinstance(v, float)}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        tags=["mmlm-fast", "multimodal", result["preset"]],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult(
                task_type=tag, dataset_type="held-out", dataset_name="held-out samples", metric_type=k, metric_value=v
            )
            for k, v in numbers.items()
        ],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, result, examples, model)}").save(folder / "README.md")


def _text(folder: Path, result: dict[str, Any], examples: Sequence[dict[str, Any]], model: Any) -> str:
    counts, shared = result["num_samples"], result["eval_samples_in_train"]
    lines = [
        f"# {folder.resolve().name}",
        "",
        f"Preset `{result['preset']}` of mmlm-fast, task {result['task']}, fusion {result['fusion']}, modalities "
        f"{', '.join(result['modalities'])}; {result['num_parameters']:,} parameters; seed {result['seed']}; trained on"
        " "
        f"{counts['train']} samples, judged on {counts['eval']} {'' if shared else 'others '}in "
        f"{result['seconds']:.0f} s.",
        "",
        *([f"**{_shared_sentence(result)}**", ""] if shared else []),
        "## How to load",
        "",
        *how_to_load(result, model),
        "",
        "## Metrics",
        "",
        "| metric | value |",
        "|---|---:|",
        *(f"| {k} | {_shown(v)} |" for k, v in _numbers(result)),
    ]
    if result["chance"] is not None:
        lines.append(f"| chance | {result['chance']:.4f} |")
    if result["controls"]:
        lines += ["", "## Shuffled-modality controls", "", control_sentence(), "", *control_table(result)]
    if "classification_report" in result["metrics"]:
        lines += ["", "## Classification report", "", "```", result["metrics"]["classification_report"].rstrip(), "```"]
    if examples:
        lines += ["", "## Examples", "", "| input | reference | model |", "|---|---|---|"]
        lines += [f"| {_cell(e['text'])} | {_cell(e['reference'])} | {_cell(e['prediction'])} |" for e in examples]
    if result["bad_samples"]:
        lines += ["", f"## {len(result['bad_samples'])} bad samples were left out", ""]
        lines += [f"- {problem}" for problem in result["bad_samples"][:50]]
    return "\n".join(lines) + "\n"


def summary_lines(result: dict[str, Any]) -> list[str]:
    """Return the numbers in a few lines of plain text."""
    lines = [f"{k}: {_shown(v)}" for k, v in _numbers(result)]
    if result["chance"] is not None:
        lines.append(f"chance: {result['chance']:.4f}")
    name = next(iter(result["metrics"]), None)
    for modality, control in result["controls"].items():
        lost = _shown(control["loss_interval"])
        lines.append(f"{modality} shuffled: {name} {control['metrics'][name]:.4f}, score lost {lost}")
    if result["eval_samples_in_train"]:
        lines.append(_shared_sentence(result))
    if result["bad_samples"]:
        lines.append(f"bad samples left out: {len(result['bad_samples'])}")
        lines += [f"  {problem}" for problem in result["bad_samples"][:10]]
    return lines


def control_sentence() -> str:
    return (
        "Each row: the same evaluation with one modality taken from another sample. The interval is of the mean score "
        "lost by that (95 %, bootstrap over samples); above 0, the model uses the modality."
    )


def control_table(result: dict[str, Any]) -> list[str]:
    """Return the Markdown lines of a table of the controls."""
    name = next(iter(result["metrics"]))
    lines = [f"| shuffled | {name} | intact | score lost, interval | used |", "|---|---:|---:|---|---|"]
    for modality, control in result["controls"].items():
        used = {True: "yes", False: "no", None: "not known"}[control["used"]]
        lines.append(
            f"| {modality} | {control['metrics'][name]:.3f} | {result['metrics'][name]:.3f} | "
            f"{_shown(control['loss_interval'], 3)} | {used} |"
        )
    return lines


def _numbers(result: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in result["metrics"].items() if isinstance(v, (float, list)) or k.endswith("_interval")]


def _shared_sentence(result: dict[str, Any]) -> str:
    return (
        f"{result['eval_samples_in_train']} of {result['num_samples']['eval']} evaluated samples were trained on: the "
        "numbers say little about other samples."
    )


def how_to_load(result: dict[str, Any], model: Any) -> list[str]:
    """Return the Markdown lines of a snippet that runs in the folder of the model."""
    task, cls, config = TASKS[result["task"]], type(model).__name__, model.config
    modalities = ["text"]
    if task.reads_images:
        known = getattr(config, "modalities", None) or ("image",)
        modalities = [m for m in known if m in (*result["modalities"], "text")]
    names = sorted([cls, "MMLMProcessor", *task.extra_imports])
    lines = ["```python", *(["import numpy"] if "audio" in modalities else [])]
    lines += ["from PIL import Image"] if "image" in modalities else []
    lines += ["", f"from mmlm_fast.models import {', '.join(names)}", ""]
    lines += ['folder = "."  # of this file', f"model = {cls}.from_pretrained(folder)"]
    lines += ["processor = MMLMProcessor.from_pretrained(folder)"]
    inputs = []
    if "image" in modalities:
        lines.append('picture = Image.new("RGB", (64, 64), "white")  # or Image.open("picture.png").convert("RGB")')
        inputs.append("images=[picture]")
    if "audio" in modalities:
        lines.append("clip = numpy.zeros(16000, numpy.float32)  # of one second, mono, 16 kHz")
        inputs += ["audio=[clip]", "sampling_rate=16000"]
    kind = getattr(config, "fusion_kind", None)  # an image tokenizer's configuration has none
    marks = "".join(f"<{m}>" for m in modalities if m != "text") if kind is not None and kind.places_tokens else ""
    lines += task.example(config, modalities, task.example_text(config, marks), inputs)
    return [*lines, "```"]


def _shown(value: Any, digits: int = 4) -> str:
    if value is None:
        return "none: of fewer than two samples"
    return " – ".join(f"{x:.{digits}f}" for x in value) if isinstance(value, list) else f"{value:.{digits}f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
