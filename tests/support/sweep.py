"""Every model class of transformers, planned from its default configuration: ``python -m support.sweep --write``.

Nothing that `accelerate` finds in a class it has not met may fail. Models of text that fit into memory are run and
compared, too.
"""

import argparse
import contextlib
import json
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils import _pytree as pytree
from tqdm import tqdm
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import mmlm_fast
from mmlm_fast.ops.paths import Path as OpPath
from mmlm_fast.ops.paths import forced
from mmlm_fast.testing import difference

FOLDER = Path(__file__).parents[2] / "docs" / "sweep"
LARGEST = 60_000_000  # parameters of a model that is run
SECONDS = 60  # for one class
LAYERS = (
    "num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layer", "n_layers", "depth",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip


def classes() -> dict[str, list[str]]:
    """Configuration class -> the model classes that transformers names for it, the bare one first."""
    found: dict[str, list[str]] = {}
    for name, mapping in vars(modeling_auto).items():
        if not (name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")):
            continue
        for kind, models in mapping.items():
            for model in (models,) if isinstance(models, str) else models:
                if kind in CONFIG_MAPPING_NAMES and model not in found.setdefault(CONFIG_MAPPING_NAMES[kind], []):
                    found[CONFIG_MAPPING_NAMES[kind]].append(model)
    return dict(sorted(found.items()))


def shortened(config: Any) -> Any:
    """Two layers of each stack; sub-configurations, too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shortened(value)
        elif name in LAYERS and isinstance(value, int) and value > 2:
            with contextlib.suppress(Exception):  # derived, or checked against another
                setattr(config, name, 2)
        elif name == "layer_types" and isinstance(value, list):
            with contextlib.suppress(Exception):
                config.layer_types = value[:2]
    return config


class _TooSlowError(Exception):
    pass


@contextlib.contextmanager
def limited(seconds: int) -> Any:
    def stop(*args: Any) -> None:
        raise _TooSlowError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row_of(config_name: str, model_name: str) -> dict[str, Any]:
    """Counts of what would be replaced and left by kind, and how a forward compares; or why there is no model."""
    config_class, cls = getattr(transformers, config_name, None), getattr(transformers, model_name, None)
    if config_class is None or not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        return {"model": "not in this installation"}
    try:
        with limited(SECONDS):
            config = shortened(config_class())
            with torch.device("meta"):
                model = cls(config)
    except Exception as error:
        return {"model": f"not built from its default configuration: {type(error).__name__}"}
    plan = mmlm_fast.accelerate(model, plan_only=True, strict=False, quiet=True)
    row: dict[str, Any] = {"replaced": dict(Counter(r.kind for r in plan.replaced))}
    left = Counter(f"{r.kind}: {r.reason}" for r in plan.refused)
    if left:
        row["left"] = dict(left)
    if row["replaced"]:
        row["forward"] = compared(cls, config, sum(p.numel() for p in model.parameters()))
    return row


def compared(cls: Any, config: Any, size: int) -> str:
    """ "equal" within the accuracy rule, or why nothing was run."""
    if size > LARGEST:
        return "not run: larger than 60 million parameters"
    if getattr(cls, "main_input_name", "") != "input_ids":
        return "not run: its input is not text alone"
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :8]
    try:
        with limited(SECONDS), torch.no_grad():
            torch.manual_seed(0)
            model = cls(config).eval()
            wide = output(model.double(), inputs)
            model.float()
            theirs = output(model, inputs)
            if theirs is None or not torch.equal(output(model, inputs), theirs):
                return "not run: its output is none that can be compared"
    except Exception as error:
        return f"not run: the original fails on text alone: {type(error).__name__}"
    mmlm_fast.accelerate(model, quiet=True, strict=False)
    with torch.no_grad(), forced(OpPath.NATIVE):
        found = difference(output(model, inputs), theirs, wide)
    return "equal" if found.ok else f"differs: {found.error:.1e}, allowed {found.allowed:.1e}"


def output(model: Any, inputs: dict[str, Any]) -> Any:
    """All numbers of the output, hidden states among them: an error norm over few numbers is a matter of luck."""
    leaves = pytree.tree_leaves(model(**inputs, output_hidden_states=True).to_tuple())
    floats = [v.flatten() for v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return torch.cat(floats) if floats else None


def main(argv: list[str] | None = None) -> int:
    """Print what fails or differs; with ``--write`` keep all rows beside those of other versions."""
    parser = argparse.ArgumentParser(prog="python -m support.sweep", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only classes whose name contains one of these")
    parser.add_argument("--write", action="store_true", help="into docs/sweep/, in place of the rows of these classes")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    wanted = [
        (config, model)
        for config, models in classes().items()
        for model in models
        if not args.words or any(word in model for word in args.words)
    ]
    rows = {}
    for config, model in tqdm(wanted, unit="class"):
        try:
            rows[model] = row_of(config, model)
        except Exception as error:
            rows[model] = {"failed": f"{type(error).__name__}: {error}"}
    bad = {m: r for m, r in rows.items() if "failed" in r or str(r.get("forward", "")).startswith("differs")}
    for model, row in bad.items():
        print(model, row)
    ends = Counter(r.get("forward", "nothing to replace" if "replaced" in r else r.get("model")) for r in rows.values())
    print(f"transformers {transformers.__version__}: {len(rows)} classes, {len(bad)} fail or differ; {dict(ends)}")
    if args.write:
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"{transformers.__version__}.json"
        if args.words and path.exists():  # a part replaces its own rows
            rows = json.loads(path.read_text(encoding="utf-8")) | rows
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
