"""Training from a configuration file, on transformers' Trainer: train, evaluate, save, describe."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from mmlm_fast.training import checkpoints
from mmlm_fast.training.arguments import training_arguments
from mmlm_fast.training.building import build, check
from mmlm_fast.training.card import write_card
from mmlm_fast.training.collator import Collator
from mmlm_fast.training.data import num_shared, read_data
from mmlm_fast.training.evaluation import judge_model
from mmlm_fast.training.fitting import TrainingError, fit, message_of, trainer_of
from mmlm_fast.training.image_generation import load_or_train_image_tokenizer, paint
from mmlm_fast.training.resuming import CHECKPOINTS, IMAGE_TOKENIZER, begin, record_of, stages_of, whole_checkpoints
from mmlm_fast.training.samples import BadSampleError, Sample, usable
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import TASKS


@contextmanager
def _leaving_no_empty_folder(output: Path) -> Iterator[None]:
    """Remove folders that were made for results, if an error comes before there are any."""
    missing = [path for path in (output / CHECKPOINTS, output, *output.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not empty, not made, or removed by another process
                path.rmdir()
        raise


def train(
    settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train as `settings` say, evaluate with controls, and write model, processor, metrics.json, predictions.jsonl,
    model card and TensorBoard logs into ``settings.output``.

    Args:
        resume: Go on from the last checkpoint in the output folder that is whole.
        overwrite: Start anew although the folder holds results. Checkpoints of the earlier run are deleted, results are
            replaced at the end, other files stay.
        progress: Show progress bars.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: for settings or samples that cannot be used, a folder that is not empty, nothing to resume, and
            settings or data other than those of the run to be resumed.
        BadSampleError: for the first bad sample, unless ``data.bad_samples`` is ``skip``.
        TrainingError: for what goes wrong in the midst of training.
    """
    with _leaving_no_empty_folder(Path(settings.output)):
        return _train(settings, resume, overwrite, progress)


def _train(settings: TrainSettings, resume: bool, overwrite: bool, progress: bool) -> dict[str, Any]:
    start = time.perf_counter()
    output, task = Path(settings.output), TASKS[settings.task]
    arguments = training_arguments(settings.training, output / CHECKPOINTS, settings.seed, progress)
    check(settings)
    checkpoint = _checkpoint_to_resume(settings, resume, overwrite)
    PartialState().wait_for_everyone()  # before the first process changes what the others look at
    transformers.set_seed(settings.seed)
    skip = settings.data.bad_samples == "skip"
    bad_lines: list[str] = []
    train_samples, eval_samples = read_data(settings, bad_lines if skip else None)
    labels = task.class_names(settings, train_samples)
    texts = [s.text for s in train_samples] + [s.target for s in train_samples if s.target]
    model, processor = _build(settings, labels, texts)
    options: dict[str, Any] = dict(labels=labels, modalities=settings.data.modalities)
    options |= dict(seed=settings.seed, num_frames=settings.data.num_frames)
    collator = Collator(settings.task, model, processor, **options)
    eval_collator = Collator(
        settings.task, model, processor, augment=settings.evaluation.augment, with_targets=False, **options
    )
    # Without a tokenizer of pictures there are no targets yet.
    read = eval_collator.read if task.needs_image_tokenizer else collator.read
    train_samples, bad_in_train = usable(train_samples, collator.check, skip=skip, progress=progress, read=read)
    eval_samples, bad_in_eval = usable(eval_samples, collator.check, skip=skip, progress=progress, read=read)
    _check_evaluation(settings, eval_samples)
    record = record_of(settings, labels, train_samples, processor, arguments)
    trainer = trainer_of(model, collator, train_samples, eval_samples, settings, arguments)
    main_stage, first_stage = stages_of(settings)
    begin(main_stage, record, resume, first_stage)
    tokenizer = None
    if task.needs_image_tokenizer:
        tokenizer = load_or_train_image_tokenizer(
            settings, processor, train_samples, eval_samples, record, resume, progress
        )
        collator.image_tokenizer = eval_collator.image_tokenizer = tokenizer
    history = fit(trainer, checkpoint)
    result: dict[str, Any] = {
        "task": settings.task,
        "preset": settings.preset,
        "fusion": getattr(model.config, "fusion", None),
        "modalities": settings.data.modalities,
        "seed": settings.seed,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_samples": {"train": len(train_samples), "eval": len(eval_samples)},
        "eval_samples_in_train": num_shared(train_samples, eval_samples),
        "bad_samples": bad_lines + bad_in_train + bad_in_eval,
        "labels": labels,
    }
    try:
        evaluated, predictions = judge_model(model, eval_collator, eval_samples, settings, progress)
    except BadSampleError:
        raise
    except Exception as error:
        raise TrainingError(f"evaluation: {message_of(error)}") from error
    result |= evaluated | {"history": history, "seconds": round(time.perf_counter() - start, 1)}
    if tokenizer is not None:
        result["pictures"], readability = paint(model, tokenizer, eval_collator, train_samples, eval_samples, output)
        result["metrics"] |= readability
    if PartialState().is_main_process:
        _write(output, model, processor, tokenizer, result, predictions, settings)
    PartialState().wait_for_everyone()
    return result


def _build(settings: TrainSettings, labels: Sequence[str], texts: Sequence[str]) -> tuple[Any, Any]:
    try:
        return build(settings, labels, texts)
    except ValueError:
        raise
    except Exception as error:  # of transformers' and torch's modules
        raise ValueError(f"model: {message_of(error)}") from error


def _checkpoint_to_resume(settings: TrainSettings, resume: bool, overwrite: bool) -> Path | None:
    """Return the last whole checkpoint in the output folder; None to start anew, or where only the first stage of two
    has begun."""
    output = Path(settings.output)
    if resume and overwrite:
        raise ValueError("resume goes on, overwrite starts anew: got both")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {output} cannot be made a folder: {error.strerror or error}") from error
    if not resume:
        if not overwrite and any(output.iterdir()):
            raise ValueError(f"{output} is not empty: --resume to go on, --overwrite to start anew")
        return None
    checkpoint, problems = checkpoints.last_whole(output / CHECKPOINTS)
    if not whole_checkpoints(settings):
        if checkpoints.is_replaced(output / CHECKPOINTS):
            raise ValueError(f"nothing to resume: the run in {output} was to be replaced: --overwrite to start anew")
        incomplete = "".join(f"; {path.name} is incomplete: {problem}" for path, problem in problems.items())
        raise ValueError(
            f"nothing to resume: no {'whole ' if problems else ''}checkpoint in {output / CHECKPOINTS}{incomplete}"
        )
    return checkpoint


def _check_evaluation(settings: TrainSettings, samples: Sequence[Sample]) -> None:
    """Raise for what would only show when training is done."""
    if settings.evaluation.controls and len(samples) < 2:
        raise ValueError(f"evaluation.controls shuffles samples, which needs two or more, got {len(samples)}")
    TASKS[settings.task].check_evaluation(settings, samples)


def _write(
    output: Path,
    model: Any,
    processor: Any,
    tokenizer: Any,
    result: dict[str, Any],
    predictions: Sequence[dict[str, Any]],
    settings: TrainSettings,
) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output / IMAGE_TOKENIZER)
    (output / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in predictions]
    (output / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_card(output, result, predictions[: settings.evaluation.examples], model)
