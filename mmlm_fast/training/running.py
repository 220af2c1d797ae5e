"""Training from a configuration file, on transformers' Trainer: train, evaluate, save, describe."""

import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mmlm_fast.models import generate_images
from mmlm_fast.training.building import build, image_tokenizer_of
from mmlm_fast.training.builtin import BUILTIN
from mmlm_fast.training.card import write_card
from mmlm_fast.training.evaluation import Evaluation, controls, evaluate
from mmlm_fast.training.metrics import interval
from mmlm_fast.training.samples import Sample, load, read_samples, usable
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import TASKS, Collator

CHECKPOINTS = "checkpoints"
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "eval_strategy": "epoch",
}


class SampleList(Dataset):
    """Samples as torch's dataset; files are read by the collator, in the DataLoader's workers where there are some."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def train(
    settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train as `settings` say, evaluate with controls, and write model, processor, metrics.json, predictions.jsonl,
    model card and TensorBoard logs into ``settings.output``.

    Args:
        resume: Go on from the last checkpoint in the output folder.
        overwrite: Start anew although the folder holds results.
        progress: Show progress bars.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: for settings or samples that cannot be used, and a folder that is not empty.
        BadSampleError: for the first bad sample, unless ``data.bad_samples`` is ``skip``.
    """
    start = time.perf_counter()
    output = Path(settings.output)
    checkpoint = get_last_checkpoint(str(output / CHECKPOINTS)) if (output / CHECKPOINTS).is_dir() else None
    if resume and checkpoint is None:
        raise ValueError(f"nothing to resume: no checkpoint in {output / CHECKPOINTS}")
    if not (resume or overwrite) and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: --resume to go on, --overwrite to start anew")
    transformers.set_seed(settings.seed)
    train_samples, eval_samples = read_data(settings)
    labels = _labels(settings, train_samples)
    texts = [s.text for s in train_samples] + [s.target for s in train_samples if s.target]
    if settings.task == "image_tokenizer":
        model: Any = image_tokenizer_of(settings)
        _, processor = build(_as_generation(settings), (), ())
    else:
        model, processor = build(settings, labels, texts)
    painter = _image_tokenizer(settings, output, train_samples, eval_samples, progress)
    options: dict[str, Any] = dict(labels=labels, modalities=settings.data.modalities, image_tokenizer=painter)
    options |= dict(seed=settings.seed, num_frames=settings.data.num_frames)
    collator = Collator(settings.task, model, processor, augment=settings.data.augment, **options)
    judge = Collator(
        settings.task, model, processor, augment=settings.evaluation.augment, with_targets=False, **options
    )
    skip = settings.data.bad_samples == "skip"
    train_samples, bad = usable(train_samples, collator.check, skip=skip, progress=progress)
    eval_samples, more = usable(eval_samples, collator.check, skip=skip, progress=progress)
    history = fit(
        model, collator, train_samples, eval_samples, settings, output, checkpoint if resume else None, progress
    )
    result: dict[str, Any] = {
        "task": settings.task,
        "preset": settings.preset,
        "fusion": getattr(model.config, "fusion", None),
        "modalities": settings.data.modalities,
        "seed": settings.seed,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_samples": {"train": len(train_samples), "eval": len(eval_samples)},
        "bad_samples": bad + more,
        "labels": labels,
    }
    found, shown = judge_model(model, judge, eval_samples, settings, progress)
    result |= found | {"history": history, "seconds": round(time.perf_counter() - start, 1)}
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if painter is not None:
        result["pictures"], more_metrics = paint(model, painter, judge, train_samples, eval_samples, output)
        result["metrics"] |= more_metrics
    (output / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in shown]
    (output / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_card(output, result, shown[: settings.evaluation.examples])
    return result


def read_data(settings: TrainSettings) -> tuple[list[Sample], list[Sample]]:
    """Training and evaluation samples; without a file for the latter, the last tenth is held out."""
    data = settings.data
    if data.name is not None:
        function = BUILTIN[data.name]
        make = lambda split, count: function(data.kind or "question", split, count=count, seed=settings.seed)
        return make("train", data.train_count), make("eval", data.eval_count)
    assert data.train is not None
    train_samples = read_samples(settings.path(data.train))
    if data.eval is not None:
        eval_samples = read_samples(settings.path(data.eval))
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
    found = {
        str(x) for s in samples for x in (s.label if isinstance(s.label, list) else [s.label]) if s.label is not None
    }
    if len(found) < 2:
        raise ValueError(f"classification needs two labels or more, got {sorted(found)}; name them in data.labels")
    return sorted(found)


def fit(
    model: Any,
    collator: Collator,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    settings: TrainSettings,
    output: Path,
    checkpoint: str | None,
    progress: bool,
    overrides: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Train with transformers' Trainer; returns its log."""
    options = DEFAULTS | settings.training | (overrides or {})
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        prediction_loss_only=True,
        use_cpu=options.pop("use_cpu", not torch.cuda.is_available()),
        report_to=options.pop("report_to", ["tensorboard"] if find_spec("tensorboard") else []),
        disable_tqdm=not progress,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=SampleList(train_samples),
        eval_dataset=SampleList(eval_samples),
        data_collator=collator,
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.log_history


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
    import dataclasses

    return dataclasses.replace(settings, task="image_generation")


def _image_tokenizer(
    settings: TrainSettings,
    output: Path,
    train_samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    progress: bool,
) -> Any:
    """For pictures from text: the tokenizer named, or one trained first on the same pictures."""
    from mmlm_fast.models import MMLMImageTokenizer

    if settings.task != "image_generation":
        return None
    if settings.image_tokenizer:
        return MMLMImageTokenizer.from_pretrained(settings.path(settings.image_tokenizer)).eval()
    painter = image_tokenizer_of(settings)
    _, processor = build(settings, (), ())
    collator = Collator("image_tokenizer", painter, processor, augment=settings.data.augment, seed=settings.seed)
    folder = output / "image_tokenizer"
    fit(
        painter, collator, train_samples, eval_samples, settings, folder, None, progress,
        {"learning_rate": 2e-3, "num_train_epochs": 2 * settings.training.get("num_train_epochs", 3)},
    )  # fmt: skip
    painter.save_pretrained(folder)
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
        "read_as_asked_interval": list(interval(hits)),
        "read_as_another_text_asked": float(others.mean()),
        "real_pictures_read": float(reader.score(held_out, [str(sample.label) for sample in eval_samples])),
    }
