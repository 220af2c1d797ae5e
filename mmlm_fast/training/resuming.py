"""What a run leaves to be resumed: the checkpoints of its stages, and a record of what they are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from mmlm_fast.training import checkpoints
from mmlm_fast.training.arguments import DEFAULTS
from mmlm_fast.training.samples import Sample
from mmlm_fast.training.settings import TrainSettings

CHECKPOINTS = "checkpoints"
IMAGE_TOKENIZER = "image_tokenizer"  # folder of the first stage of image_generation


def stages_of(settings: TrainSettings) -> tuple[Path, Path]:
    """Return the folders of checkpoints of the training, and of its first stage where there are two."""
    output = Path(settings.output)
    return output / CHECKPOINTS, output / IMAGE_TOKENIZER / CHECKPOINTS


def whole_checkpoints(settings: TrainSettings) -> dict[Path, int]:
    """Return the last whole checkpoint of each stage that can be resumed, and when it was written, in nanoseconds."""
    main, first = stages_of(settings)
    if checkpoints.is_replaced(main):
        return {}
    paths = [checkpoints.last_whole(folder)[0] for folder in (main, first)]
    return {path: (path / "trainer_state.json").stat().st_mtime_ns for path in paths if path is not None}


def record_of(
    settings: TrainSettings,
    labels: Sequence[str],
    samples: Sequence[Sample],
    processor: Any,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Return what a checkpoint of the run can be resumed with; see `checkpoints.compare_record`."""
    names = ("task", "preset", "seed", "start_from", "image_tokenizer", "model", "towers")
    record = {name: getattr(settings, name) for name in names}
    record |= {f"data.{name}": getattr(settings.data, name) for name in ("modalities", "augment", "num_frames")}
    record["data.labels"] = list(labels)
    record["training samples"] = checkpoints.digest_of_samples(samples, settings.folder)
    record["tokenizer"] = checkpoints.digest_of_tokenizer(processor.tokenizer)
    record["processes"] = arguments.world_size
    record |= {f"training.{key}": value for key, value in (DEFAULTS | settings.training).items()}
    return record | {f"training.{key}": getattr(arguments, key, None) for key in checkpoints.FIXED}


def begin(folder: Path, record: dict[str, Any], resume: bool, *others: Path) -> None:
    """Leave in `folder` what the run that begins may use: the checkpoints it goes on from, or none, neither there nor
    in those of `others`; and its record."""
    if resume:
        checkpoints.compare_record(folder, record)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if resume:
            checkpoints.set_aside(checkpoints.last_whole(folder)[1])
        else:
            checkpoints.put_away(folder, *others)
        checkpoints.write_record(folder, record)
    PartialState().wait_for_everyone()
