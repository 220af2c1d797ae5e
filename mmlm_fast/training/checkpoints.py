"""Checkpoints of a run: which are whole, whose they are, and how an earlier run's are put away."""

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm_fast.training.samples import Sample

RECORD = "run.json"  # beside the checkpoints: what the run was of
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
SET_ASIDE = "incomplete-"
# A checkpoint goes on only with the same steps an epoch and the same optimizer; other changes are said, or do no harm.
FIXED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "optim",
    "train_sampling_strategy",
)  # fmt: skip
FREE = re.compile(
    r"training\.(num_train_epochs|max_steps|use_cpu|run_name|report_to|per_device_eval_batch_size|load_best_model_at_end"
    r"|(logging|save|eval|dataloader|log|hub|push|ddp|torch_compile)_.*)"
)
KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")  # an optimizer's state has them


def problem_of(checkpoint: Path) -> str | None:
    """What keeps Trainer from going on from a checkpoint; None for a whole one. Tensors are not read."""
    for name in ("trainer_state.json", "config.json"):
        path = checkpoint / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if name == "config.json":
                continue
            return f"no {name}"
        except (OSError, ValueError):
            return f"{name} cannot be read"
        number = CHECKPOINT.fullmatch(checkpoint.name)
        step = values.get("global_step") if isinstance(values, dict) else None
        if name == "trainer_state.json" and (number is None or step != int(number[1])):
            return f"{name} is not of step {number and number[1]}"
    return _weights_problem(checkpoint) or _states_problem(checkpoint)


def _weights_problem(checkpoint: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    names = {path.name for path in checkpoint.iterdir()}
    index = next((name for name in sorted(names) if name.endswith(".safetensors.index.json")), None)
    wanted = sorted(name for name in names if name.endswith(".safetensors"))
    try:
        if index is not None:
            wanted = sorted(set(json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{index} cannot be read"
    if not wanted:
        pickled = sorted(name for name in names if name.startswith("pytorch_model"))
        return _zip_problem(checkpoint / pickled[0]) if pickled else "no weights"
    for name in wanted:
        try:
            with safe_open(checkpoint / name, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{name} is not whole" if name in names else f"no {name}"
    return None


def _states_problem(checkpoint: Path) -> str | None:
    names = [path.name for path in checkpoint.iterdir()]
    rng = sorted(name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name))
    optimizer = sorted(name for name in names if name.startswith("optimizer"))
    for name in (*(optimizer or ["optimizer.pt"]), "scheduler.pt", *(rng or ["rng_state.pth"])):
        if name not in names:
            return f"no {name}"
        if (found := _zip_problem(checkpoint / name)) is not None:
            return found
    return None


def _zip_problem(path: Path) -> str | None:
    if path.is_dir():  # of a sharded optimizer
        return None if any(path.iterdir()) else f"{path.name} is empty"
    try:
        with zipfile.ZipFile(path) as file:  # what torch.save writes; its index is at the end
            return None if file.namelist() else f"{path.name} is empty"
    except (OSError, zipfile.BadZipFile):
        return f"{path.name} is not whole"


def last_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last checkpoint that is whole, and what is wrong with the later ones."""
    found = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    problems: dict[Path, str] = {}
    for path in sorted((p for p in found if p.is_dir()), key=lambda p: -int(p.name.split("-")[1])):
        problem = problem_of(path)
        if problem is None:
            return path, problems
        problems[path] = problem
    return None, problems


def set_aside(problems: dict[Path, str]) -> None:
    """Rename incomplete checkpoints, so that Trainer does not take them for its latest, and say so."""
    for path, problem in problems.items():
        other = path.with_name(SET_ASIDE + path.name)
        if other.is_dir():
            shutil.rmtree(other)
        path.rename(other)
        warnings.warn(f"{path} is incomplete ({problem}) and called {other.name} from here on", stacklevel=2)


def put_away(folder: Path) -> None:
    """Delete the checkpoints, logs and record of an earlier run, and nothing else.

    They are out of reach by one renaming before the first is deleted: a run that ends meanwhile leaves none to resume.
    """
    folder = folder.resolve()
    old = folder.with_name(folder.name + ".replaced")
    if folder.is_dir():
        if old.is_dir():  # of a run that ended there
            _delete(old, folder)
        if old.is_dir():
            raise ValueError(f"{old} has files that {folder} has too: move one of them away")
        folder.rename(old)
    if old.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _delete(old, folder)


def _delete(old: Path, folder: Path) -> None:
    for path in old.iterdir():
        written = CHECKPOINT.fullmatch(path.name.removeprefix(SET_ASIDE)) or path.name in (RECORD, "runs")
        if written:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif not (folder / path.name).exists():
            path.rename(folder / path.name)
    if not any(old.iterdir()):
        old.rmdir()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what a run is of beside its checkpoints, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f".{RECORD}"
    new.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, folder / RECORD)


def compare_record(folder: Path, record: dict[str, Any]) -> None:
    """Compare what a run to be resumed was of with what it would go on as.

    Raises:
        ValueError: naming what changed, where the checkpoint does not fit it.
    """
    try:
        held = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        warnings.warn(f"{folder} has no {RECORD}: whether it is of these settings is not known", stacklevel=2)
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RECORD} cannot be read: {error}") from error
    wanted, changes, told = json.loads(json.dumps(record)), [], []
    for name in sorted({*held, *wanted}):
        before, now = held.get(name), wanted.get(name)
        key = name.removeprefix("training.")
        if before == now or (FREE.fullmatch(name) and key not in FIXED):
            continue
        is_digest = isinstance(now, str) and len(now) == 64
        change = f"{name} (other contents)" if is_digest else f"{name} ({before!r} before, {now!r} now)"
        if key == name or key in FIXED:
            changes.append(change)
        else:
            told.append(f"{change}, of which the checkpoint's goes on" if key in KEPT else change)
    if changes:
        raise ValueError(
            f"the run in {folder} cannot be resumed, since these changed: {', '.join(changes)}; put them back, or "
            "start anew with --overwrite"
        )
    for change in told:
        warnings.warn(f"changed since the checkpoint: {change}", stacklevel=2)


def digest_of_samples(samples: Sequence[Sample], folder: Path) -> str:
    """Of what samples say, the names of their files from `folder` on, and their sizes; not of what files hold."""
    digest = hashlib.sha256()
    for sample in samples:
        files = [x for x in (*sample.images, *sample.audio, sample.video) if isinstance(x, (str, Path))]
        named = [(os.path.relpath(x, folder), Path(x).stat().st_size) for x in files]
        other = None if files else sample.name  # of a built-in set
        fields = (named, other, sample.text, sample.target, sample.label, sample.messages)
        digest.update(repr(fields).encode())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Of the tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
