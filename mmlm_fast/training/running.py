"""Training from a configuration file, on transformers' Trainer: train, evaluate, save, describe."""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmlm_fast.models import generate_images
from mmlm_fast.training import checkpoints
from mmlm_fast.training.arguments import DEFAULTS, training_arguments
from mmlm_fast.training.building import build, check, image_tokenizer_of
from mmlm_fast.training.builtin import BUILTIN
from mmlm_fast.training.card import write_card
from mmlm_fast.training.evaluation import Evaluation, controls, evaluate
from mmlm_fast.training.metrics import interval_of
from mmlm_fast.training.samples import BadSampleError, Sample, load, read_samples, usable
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import TASKS, Collator, Drawn, class_name

CHECKPOINTS = "checkpoints"
IMAGE_TOKENIZER = "image_tokenizer"  # folder of the first stage of image_generation


class SampleList(Dataset):
    """Samples as torch's dataset; files are read by the collator, in the DataLoader's workers where there are some.

    What is drawn of a sample depends on the seed, the epoch and its index alone.
    """

    def __init__(self, samples: Sequence[Sample], augment: Sequence[str] = (), seed: int = 0) -> None:
        self.samples, self.augment, self.seed = list(samples), tuple(augment), seed
        self.epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # workers that persist see it

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Drawn:
        return Drawn(self.samples[index], self.augment, (self.seed, int(self.epoch), index))


class _Trainer(Trainer):
    """Trainer that lists the files of its checkpoints, and whose loaders draw the seeds of their workers from a
    generator of their own.

    Otherwise those come from the one that dropout draws from, of workers that persist once a process: a resumed run
    would drop others than an uninterrupted one.
    """

    begin: "_Begin"

    def get_train_dataloader(self) -> Any:
        return self._apart(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        return self._apart(super().get_eval_dataloader(*args, **kwargs))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer deletes others' folders too
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        PartialState().wait_for_everyone()
        folder = Path(self.args.output_dir)
        if PartialState().is_main_process and (folder / f"checkpoint-{self.state.global_step}").is_dir():
            checkpoints.write_files(folder / f"checkpoint-{self.state.global_step}")
            best = self.state.best_model_checkpoint
            checkpoints.delete_all_but(folder, limit, None if best is None else Path(best))

    def _apart(self, loader: Any) -> Any:
        inner = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapper
        inner.generator = torch.Generator(device="cpu").manual_seed(self.args.seed)
        return loader


class _Begin(TrainerCallback):
    """What Trainer leaves out when it begins a training or an epoch."""

    def __init__(self, samples: SampleList) -> None:
        self.samples = samples
        self.begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        state.compute_steps(args, state.max_steps)  # when to log and save is what is said now, not in the checkpoint

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.samples.epoch.fill_(int(state.epoch or 0))  # accelerate's loaders tell it to their samplers alone


@contextmanager
def _leaving_no_empty_folder(output: Path) -> Iterator[None]:
    """Remove folders that were made for results, if an error comes before there are any."""
    made = [path for path in (output / CHECKPOINTS, output, *output.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
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
    output = Path(settings.output)
    arguments = training_arguments(settings.training, output / CHECKPOINTS, settings.seed, progress)
    check(settings)
    checkpoint = _checkpoint_to_resume(settings, resume, overwrite)
    PartialState().wait_for_everyone()  # before the first process changes what the others look at
    transformers.set_seed(settings.seed)
    bad: list[str] = []
    train_samples, eval_samples = read_data(settings, bad if settings.data.bad_samples == "skip" else None)
    labels = _labels(settings, train_samples)
    texts = [s.text for s in train_samples] + [s.target for s in train_samples if s.target]
    model, processor = _build(settings, labels, texts)
    options: dict[str, Any] = dict(labels=labels, modalities=settings.data.modalities)
    options |= dict(seed=settings.seed, num_frames=settings.data.num_frames)
    collator = Collator(settings.task, model, processor, **options)
    judge = Collator(
        settings.task, model, processor, augment=settings.evaluation.augment, with_targets=False, **options
    )
    # Without a tokenizer of pictures there are no targets yet.
    read = judge.read if collator.task.kind == "image_generation" else collator.read
    found: dict[str, Any] = dict(skip=settings.data.bad_samples == "skip", progress=progress, read=read)
    train_samples, more = usable(train_samples, collator.check, **found)
    eval_samples, others = usable(eval_samples, collator.check, **found)
    _check_evaluation(settings, eval_samples)
    record = _record(settings, labels, train_samples, processor, arguments)
    trainer = trainer_of(model, collator, train_samples, eval_samples, settings, arguments)
    main_stage, first_stage = _stages(settings)
    _begin(main_stage, record, resume, first_stage)
    painter = _image_tokenizer(settings, train_samples, eval_samples, record, resume, progress)
    collator.image_tokenizer = judge.image_tokenizer = painter
    history = fit(trainer, checkpoint)
    result: dict[str, Any] = {
        "task": settings.task,
        "preset": settings.preset,
        "fusion": getattr(model.config, "fusion", None),
        "modalities": settings.data.modalities,
        "seed": settings.seed,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_samples": {"train": len(train_samples), "eval": len(eval_samples)},
        "eval_samples_in_train": _num_shared(train_samples, eval_samples),
        "bad_samples": bad + more + others,
        "labels": labels,
    }
    try:
        judged, shown = judge_model(model, judge, eval_samples, settings, progress)
    except BadSampleError:
        raise
    except Exception as error:
        raise TrainingError(f"evaluation: {_told(error)}") from error
    result |= judged | {"history": history, "seconds": round(time.perf_counter() - start, 1)}
    if painter is not None:
        result["pictures"], more_metrics = paint(model, painter, judge, train_samples, eval_samples, output)
        result["metrics"] |= more_metrics
    if PartialState().is_main_process:
        _write(output, model, processor, painter, result, shown, settings)
    PartialState().wait_for_everyone()
    return result


def _build(settings: TrainSettings, labels: Sequence[str], texts: Sequence[str]) -> tuple[Any, Any]:
    try:
        if settings.task != "image_tokenizer":
            return build(settings, labels, texts)
        return image_tokenizer_of(settings), build(_as_generation(settings), (), ())[1]
    except ValueError:
        raise
    except Exception as error:  # of transformers' and torch's modules
        raise ValueError(f"model: {_told(error)}") from error


def _write(
    output: Path,
    model: Any,
    processor: Any,
    painter: Any,
    result: dict[str, Any],
    shown: Sequence[dict[str, Any]],
    settings: TrainSettings,
) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if painter is not None:
        painter.save_pretrained(output / IMAGE_TOKENIZER)
    (output / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in shown]
    (output / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_card(output, result, shown[: settings.evaluation.examples], model)


def _checkpoint_to_resume(settings: TrainSettings, resume: bool, overwrite: bool) -> Path | None:
    """Of the output folder; None to start anew, or where only the first stage of two has begun."""
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
    found, problems = checkpoints.last_whole(output / CHECKPOINTS)
    if not can_resume(settings):
        if checkpoints.is_replaced(output / CHECKPOINTS):
            raise ValueError(f"nothing to resume: the run in {output} was to be replaced: --overwrite to start anew")
        told = "".join(f"; {path.name} is incomplete: {problem}" for path, problem in problems.items())
        raise ValueError(
            f"nothing to resume: no {'whole ' if problems else ''}checkpoint in {output / CHECKPOINTS}{told}"
        )
    return found


def can_resume(settings: TrainSettings) -> bool:
    """Whether the output folder holds a whole checkpoint, of the training or of its first stage."""
    return bool(whole_checkpoints(settings))


def whole_checkpoints(settings: TrainSettings) -> dict[Path, int]:
    """The last whole checkpoint of each stage that can be resumed, and when it was written, in nanoseconds."""
    main, first = _stages(settings)
    if checkpoints.is_replaced(main):
        return {}
    found = [checkpoints.last_whole(folder)[0] for folder in (main, first)]
    return {path: (path / "trainer_state.json").stat().st_mtime_ns for path in found if path is not None}


def _stages(settings: TrainSettings) -> tuple[Path, Path]:
    """Folders of checkpoints: of the training, and of its first stage where there are two."""
    output = Path(settings.output)
    return output / CHECKPOINTS, output / IMAGE_TOKENIZER / CHECKPOINTS


def _begin(folder: Path, record: dict[str, Any], resume: bool, *others: Path) -> None:
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


def _record(
    settings: TrainSettings,
    labels: Sequence[str],
    samples: Sequence[Sample],
    processor: Any,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """What a checkpoint of the run can be resumed with; see `checkpoints.compare_record`."""
    names = ("task", "preset", "seed", "start_from", "image_tokenizer", "model", "towers")
    record = {name: getattr(settings, name) for name in names}
    record |= {f"data.{name}": getattr(settings.data, name) for name in ("modalities", "augment", "num_frames")}
    record["data.labels"] = list(labels)
    record["training samples"] = checkpoints.digest_of_samples(samples, settings.folder)
    record["tokenizer"] = checkpoints.digest_of_tokenizer(processor.tokenizer)
    record["processes"] = arguments.world_size
    record |= {f"training.{key}": value for key, value in (DEFAULTS | settings.training).items()}
    return record | {f"training.{key}": getattr(arguments, key, None) for key in checkpoints.FIXED}


def _check_evaluation(settings: TrainSettings, samples: Sequence[Sample]) -> None:
    """Raise for what would only show when training is done."""
    if settings.evaluation.controls and len(samples) < 2:
        raise ValueError(f"evaluation.controls shuffles samples, which needs two or more, got {len(samples)}")
    if TASKS[settings.task].kind == "retrieval" and not any(s.images or s.video or s.audio for s in samples):
        raise ValueError(f"task {settings.task} needs pictures or clips to evaluate, got texts alone")


def _num_shared(train_samples: Sequence[Sample], eval_samples: Sequence[Sample]) -> int:
    """How many samples from files are in both."""

    def contents(sample: Sample) -> str | None:
        paths = (*sample.images, *sample.audio)
        if not all(isinstance(x, (str, Path)) for x in paths):
            return None
        return repr(dataclasses.replace(sample, name="", images=tuple(map(str, paths)), audio=()))

    seen = {contents(sample) for sample in train_samples} - {None}
    return sum(contents(sample) in seen for sample in eval_samples)


def read_data(settings: TrainSettings, problems: list[str] | None = None) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples; without a file for the latter, the last tenth is held out.

    Args:
        problems: See `read_samples`.
    """
    data = settings.data
    if data.name is not None:
        function = BUILTIN[data.name]
        make = lambda split, count: function(data.kind or "question", split, count=count, seed=settings.seed)
        return make("train", data.train_count), make("eval", data.eval_count)
    assert data.train is not None
    train_samples = read_samples(settings.path(data.train), problems, name=data.train)
    if data.eval is not None:
        eval_samples = read_samples(settings.path(data.eval), problems, name=data.eval)
    else:
        held_out = max(1, len(train_samples) // 10)
        if len(train_samples) < 2:
            raise ValueError("one sample cannot be split: name data.eval")
        train_samples, eval_samples = train_samples[:-held_out], train_samples[-held_out:]
    return train_samples[: data.train_count], eval_samples[: data.eval_count]


def _labels(settings: TrainSettings, samples: Sequence[Sample]) -> list[str]:
    if TASKS[settings.task].kind != "classification" or settings.model.get("problem_type") == "regression":
        return []
    if settings.data.labels:
        return settings.data.labels
    listed = [s.label if isinstance(s.label, (list, tuple)) else [s.label] for s in samples]
    found = {name for labels in listed for label in labels if (name := class_name(label)) is not None}
    if len(found) < 2:
        raise ValueError(f"classification needs two labels or more, got {sorted(found)}; name them in data.labels")
    return sorted(found)


class TrainingError(RuntimeError):
    """What went wrong after the first step of a training began."""


def trainer_of(
    model: Any,
    collator: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    settings: TrainSettings,
    arguments: TrainingArguments,
) -> Trainer:
    """transformers' Trainer, of which all that a training begins with could be built.

    Raises:
        ValueError: for settings that it cannot be built from, whatever the error was.
    """
    changing = SampleList(train_samples, settings.data.augment, settings.seed)
    begin = _Begin(changing)
    try:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=changing,
            eval_dataset=SampleList(eval_samples, settings.evaluation.augment, settings.seed + 1),
            data_collator=collator,
            callbacks=[begin],
        )
        trainer.get_train_dataloader()
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=100, optimizer=trainer.optimizer)
    except Exception as error:
        raise ValueError(f"training: {_told(error)}") from error
    trainer.optimizer = trainer.lr_scheduler = None  # made again when it trains, for as many steps as there are
    trainer.begin = begin
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    return trainer


def fit(trainer: Trainer, checkpoint: Path | None) -> list[dict[str, Any]]:
    """Train; returns Trainer's log.

    Raises:
        BadSampleError: for a sample that shows when it is read.
        ValueError: for settings that no training begins with.
        TrainingError: for other errors on the way.
    """
    transformers.set_seed(trainer.args.seed)  # whatever went before
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BadSampleError as error:
        # Out of a DataLoader's worker comes the text of a traceback, whose last line is the error.
        mark = f"{BadSampleError.__module__}.{BadSampleError.__name__}: "
        raise BadSampleError(str(error).rpartition(mark)[2].strip()) from error
    except Exception as error:
        if not trainer.begin.begun:
            raise ValueError(f"training: {_told(error)}") from error
        raise TrainingError(f"step {trainer.state.global_step + 1}: {_told(error)}") from error
    return trainer.state.log_history


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: {error}"


def judge_model(
    model: Any, judge: Collator, samples: Sequence[Sample], settings: TrainSettings, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics and controls, and a row for each prediction."""
    options: dict[str, Any] = dict(batch_size=settings.evaluation.batch_size, seed=settings.seed + 1)
    options |= dict(progress=progress, generation=settings.evaluation.generation)
    if judge.task.kind == "image_generation":
        judge.with_targets = True
    intact = evaluate(model, judge, samples, **options)
    wanted = settings.evaluation.controls if intact.scores.size else []
    shown = []
    for sample, said in zip(samples, intact.predictions, strict=False):
        truth = sample.label if judge.task.kind == "classification" else judge.target(sample)
        shown.append({"name": sample.name, "text": sample.text, "reference": truth, "prediction": said})
    return {
        "metrics": intact.metrics,
        "chance": chance(judge, samples, intact),
        "controls": controls(model, judge, samples, intact, wanted, **options),
    }, shown


def chance(judge: Collator, samples: Sequence[Sample], intact: Evaluation) -> float | None:
    """Of always naming the most frequent class of these samples, or of a random candidate; None for neither."""
    if judge.task.kind == "retrieval":
        return intact.metrics["chance_at_1"]
    if judge.task.kind == "classification" and not (judge.several or judge.regression):
        counts = np.bincount([judge.label_of(sample) for sample in samples])
        return float(counts.max() / counts.sum())
    return None


def _as_generation(settings: TrainSettings) -> TrainSettings:
    return dataclasses.replace(settings, task="image_generation")


def _image_tokenizer(
    settings: TrainSettings,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    record: dict[str, Any],
    resume: bool,
    progress: bool,
) -> Any:
    """For pictures from text: the tokenizer named, or one trained first on the same pictures."""
    from mmlm_fast.models import MMLMImageTokenizer

    if settings.task != "image_generation":
        return None
    if settings.image_tokenizer:
        return MMLMImageTokenizer.from_pretrained(settings.path(settings.image_tokenizer)).eval()
    folder = Path(settings.output) / IMAGE_TOKENIZER
    transformers.set_seed(settings.seed)  # whatever went before
    painter = image_tokenizer_of(settings)
    _, processor = build(settings, (), ())
    collator = Collator("image_tokenizer", painter, processor, seed=settings.seed)
    epochs = settings.training.get("num_train_epochs", DEFAULTS["num_train_epochs"])
    changes = {"learning_rate": 2e-3, "num_train_epochs": 2 * epochs}
    arguments = training_arguments(settings.training | changes, folder / CHECKPOINTS, settings.seed, progress)
    record = record | {"stage": IMAGE_TOKENIZER}
    resume = resume and (folder / CHECKPOINTS / checkpoints.RECORD).is_file()
    checkpoint = checkpoints.last_whole(folder / CHECKPOINTS)[0] if resume else None
    trainer = trainer_of(painter, collator, train_samples, eval_samples, settings, arguments)
    _begin(folder / CHECKPOINTS, record, resume)
    fit(trainer, checkpoint)
    return painter.eval()


def paint(
    model: Any,
    painter: Any,
    judge: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    output: Path,
    draws: int = 4,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pictures of the different texts, `draws` each by sampling, the first of each as PNG files.

    Returns:
        Text and file of each; and where samples have labels, how often a classifier (scikit-learn's SVC, trained on the
        real training pictures) reads the label of the text from the generated picture, from the picture of another text
        (the control), and from real held-out pictures.
    """
    from PIL import Image

    by_text = {sample.text: sample for sample in eval_samples}
    asked = [sample for sample in by_text.values() for _ in range(draws)]
    pixels = generate_images(
        model.eval(), painter, judge.processor, [sample.text for sample in asked], do_sample=True
    ).cpu()
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    means, deviations = (
        torch.tensor(getattr(judge.processor.image_processor, name))[:, None, None]
        for name in ("image_mean", "image_std")
    )
    rows = []
    for i, (sample, picture) in enumerate(zip(asked[::draws], pixels[::draws], strict=True)):
        values = ((picture * deviations + means).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(values).save(folder / f"{i}.png")
        rows.append({"text": sample.text, "file": f"pictures/{i}.png"})
    if any(sample.label is None for sample in (*train_samples, *eval_samples)):
        return rows, {}
    from sklearn.svm import SVC

    real = [judge.pixels([load(sample)]).flatten().numpy() for sample in train_samples[:2000]]
    reader = SVC().fit(real, [str(sample.label) for sample in train_samples[:2000]])
    said = reader.predict(pixels.flatten(1).numpy())
    labels = np.array([str(sample.label) for sample in asked])
    hits = (said == labels).astype(float)
    others = (said == np.roll(labels, draws * (len(by_text) // 2))).astype(float)
    held_out = [judge.pixels([load(sample)]).flatten().numpy() for sample in eval_samples]
    return rows, {
        "read_as_asked": float(hits.mean()),
        **interval_of("read_as_asked", hits),
        "read_as_another_text_asked": float(others.mean()),
        "real_pictures_read": float(reader.score(held_out, [str(sample.label) for sample in eval_samples])),
    }
