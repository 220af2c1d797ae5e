"""Checkpoints of a run: which are whole, whose they are, and how an earlier run's are put away."""

import hashlib
import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmlm_fast.training.samples import Sample

RECORD = "run.json"  # beside the checkpoints: what the run was of
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
FILES = "files.json"  # in a checkpoint, written last: the checksums of its files
SET_ASIDE = "incomplete-"
KEPT_APART = "not-of-the-run-"  # what else lay in a checkpoint that was deleted
REPLACED = "being replaced"  # key of a record: the checkpoints beside it are of no run any more
# What Trainer writes into a checkpoint, for those that are older than their list of files.
WRITTEN = re.compile(
    r"(adapter_)?(config|generation_config|trainer_state)\.json|(model|pytorch_model|adapter_model).*|optimizer.*"
    r"|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|training_args\.bin|zero_to_fp32\.py|latest|global_step\d+"
)
WHOLE = 2**30  # bytes of data files that are compared in full; of more, pieces of each
PIECE = 2**12
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
    """Return what keeps Trainer from going on from a checkpoint; None for a whole one."""
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
    return _weights_problem(checkpoint) or _states_problem(checkpoint) or _contents_problem(checkpoint)


def write_files(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files into it."""
    checksums = {str(path.relative_to(checkpoint)): _checksum(path) for path in sorted(_files(checkpoint))}
    _write_json(checkpoint / FILES, checksums)


def _contents_problem(checkpoint: Path) -> str | None:
    """Name a file that is not as it was written; None also for checkpoints older than their list."""
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        for name, wanted in listed.items():
            if _checksum(checkpoint / name) != wanted:
                return f"{name} is not whole"
    except FileNotFoundError as error:
        name = os.path.relpath(error.filename, checkpoint)
        return None if name == FILES else f"no {name}"
    except (OSError, ValueError, AttributeError, TypeError):
        return f"{FILES} cannot be read"
    return None


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != FILES)


def _checksum(path: Path) -> int:
    status = path.stat()
    return _checksum_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _checksum_of(path: Path, size: int, changed_ns: int) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return total


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
        if (problem := _zip_problem(checkpoint / name)) is not None:
            return problem
    return None


def _zip_problem(path: Path) -> str | None:
    if path.is_dir():  # of a sharded optimizer
        return None if any(path.iterdir()) else f"{path.name} is empty"
    try:
        with zipfile.ZipFile(path) as file:  # what torch.save writes; its index is at the end
            if not file.namelist():
                return f"{path.name} is empty"
            return f"{path.name} is not whole" if file.testzip() else None
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
        return f"{path.name} is not whole"


def last_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the last checkpoint that is whole, and what is wrong with the later ones."""
    paths = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    problems: dict[Path, str] = {}
    for path in sorted((p for p in paths if p.is_dir()), key=lambda p: -int(p.name.split("-")[1])):
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


def put_away(folder: Path, *others: Path) -> None:
    """Delete the checkpoints, logs and record of an earlier run, in `folder` and those of its other stages, and nothing
    that the run did not write.

    They are out of reach by one writing before the first is deleted: a run that ends meanwhile leaves none to resume.
    """
    write_record(folder, {REPLACED: True})
    for place in (folder, *others):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            if path.is_symlink() or not path.is_dir():
                continue
            if path.name == "runs":
                _delete(path, [p for p in path.rglob("events.out.tfevents.*") if p.is_file()])
            elif CHECKPOINT.fullmatch(path.name.removeprefix(SET_ASIDE)):
                _delete_checkpoint(path)
        if place != folder:
            (place / RECORD).unlink(missing_ok=True)


def delete_all_but(folder: Path, limit: int | None, best: Path | None) -> None:
    """Delete checkpoints but the last `limit` (None: all), of which the best is one; but the last stays in any case."""
    paths = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    paths.sort(key=lambda path: int(path.name.split("-")[1]))
    if limit is None or len(paths) <= limit:
        return
    kept = paths[-limit:]
    if best is not None and best.name in [path.name for path in paths] and best.name not in [p.name for p in kept]:
        kept = [path for path in paths if path.name == best.name] + kept[-max(1, limit - 1) :]
    for path in paths:
        if path not in kept:
            _delete_checkpoint(path)


def is_replaced(folder: Path) -> bool:
    """Return whether a run that was to replace the one in `folder` ended before it had deleted its checkpoints."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and REPLACED in record


def _delete_checkpoint(checkpoint: Path) -> None:
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        mine = [checkpoint / name for name in listed if (checkpoint / name).is_file()]
    except (OSError, ValueError, TypeError):
        mine = [path for path in checkpoint.iterdir() if WRITTEN.fullmatch(path.name)]
    _delete(checkpoint, mine)
    if not checkpoint.is_dir():
        return
    number = 0
    while (kept := checkpoint.with_name(f"{KEPT_APART}{checkpoint.name}" + f"-{number}" * bool(number))).exists():
        number += 1
    checkpoint.rename(kept)  # Trainer deletes old checkpoints with all that is in them
    warnings.warn(f"{kept} holds what lay in {checkpoint.name}, now deleted, and is not of the run", stacklevel=2)


def _delete(folder: Path, mine: Iterable[Path]) -> None:
    """Delete these in `folder`, then it and what is in it as far as that is empty."""
    for path in mine:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / FILES).unlink(missing_ok=True)
    places = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in (*sorted(places, key=lambda p: -len(p.parts)), folder):
        if not any(path.iterdir()):
            path.rmdir()


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write what a run is of beside its checkpoints, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / RECORD, record)


def _write_json(path: Path, values: Any) -> None:
    new = path.with_name(f".{path.name}")
    new.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(new, path)


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
    if not isinstance(held, dict):
        raise ValueError(f"{folder / RECORD} cannot be read: must hold an object, got {type(held).__name__}")
    wanted, changes, warned_of = json.loads(json.dumps(record)), [], []
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
            warned_of.append(f"{change}, of which the checkpoint's goes on" if key in KEPT else change)
    if changes:
        raise ValueError(
            f"the run in {folder} cannot be resumed, since these changed: {', '.join(changes)}; put them back, or "
            "start anew with --overwrite"
        )
    for change in warned_of:
        warnings.warn(f"changed since the checkpoint: {change}", stacklevel=2)


def digest_of_samples(samples: Sequence[Sample], folder: Path) -> str:
    """Digest what samples say, the names of their files from `folder` on, and what those hold: all of it where they
    have a gibibyte together, else the sizes and the first, middle and last four kibibytes of each."""
    digest, named = hashlib.sha256(), [_files_of(sample) for sample in samples]
    sizes = {path: path.stat().st_size for paths in named for path in paths}
    whole, contents = sum(sizes.values()) <= WHOLE, {}
    for path, size in sizes.items():
        contents[path] = (os.path.relpath(path, folder), size, _digest_of_file(path, size, whole))
    for sample, paths in zip(samples, named, strict=True):
        other = None if paths else sample.name  # of a built-in set
        held = [contents[path] for path in paths]
        fields = (held, other, sample.text, sample.target, sample.label, sample.messages)
        digest.update(repr(fields).encode())
    return digest.hexdigest()


def _files_of(sample: Sample) -> list[Path]:
    return [Path(x) for x in (*sample.images, *sample.audio, sample.video) if isinstance(x, (str, Path))]


def _digest_of_file(path: Path, size: int, whole: bool) -> str:
    with path.open("rb") as file:
        if whole or size <= 3 * PIECE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for place in (0, (size - PIECE) // 2, size - PIECE):
            file.seek(place)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Digest the tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
