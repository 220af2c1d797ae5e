"""Evaluation of a model on samples: metrics, confidence intervals, and controls in which a modality is shuffled."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlm_fast.training import metrics
from mmlm_fast.training.collator import Collator
from mmlm_fast.training.samples import Sample
from mmlm_fast.training.settings import TrainSettings
from mmlm_fast.training.tasks import Evaluation


def evaluate(
    model: Any,
    collator: Collator,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    seed: int = 0,
    generation: dict[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate `model` on `samples`, in eval mode, without gradients.

    Args:
        collator: As in training, with ``with_targets=False`` for generation. Its draws start from `seed`, so that the
            same call gives the same numbers.
        generation: Options of ``generate``; by default greedy, up to 64 tokens.
    """
    if not samples:
        raise ValueError("evaluation needs samples, got none")
    was_training = model.training
    model.eval()
    collator.rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    batches = _batches(model, collator, samples, batch_size, progress)
    try:
        with torch.no_grad():
            return collator.task.evaluate(model, collator, samples, batches, generation or {})
    finally:
        model.train(was_training)


def _batches(
    model: Any, collator: Collator, samples: Sequence[Sample], batch_size: int, progress: bool
) -> Iterator[dict[str, Any]]:
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="evaluating", disable=not progress, leave=False, unit="batch"):
        batch = collator(samples[start : start + batch_size])
        yield {name: value.to(model.device) for name, value in batch.items()}


def controls(
    model: Any,
    collator: Collator,
    samples: Sequence[Sample],
    intact: Evaluation,
    modalities: Sequence[str],
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Evaluate with each modality shuffled among the samples: the metrics, and the interval of what is lost.

    ``used`` says whether the interval of the mean score lost lies above 0: the model uses the modality; None where too
    few samples are judged for an interval.
    """
    name = collator.task.metrics[0]
    by_modality = {}
    for modality in modalities:
        control = evaluate(model, collator, shuffled(samples, modality), **options)
        lost = intact.scores - control.scores
        lost = lost[~np.isnan(lost)]
        interval = metrics.interval_of("loss", -lost if name in metrics.ERROR_RATES else lost)
        bounds = interval["loss_interval"]
        used = None if bounds is None else bounds[0] > 0
        by_modality[modality] = {"metrics": control.metrics, **interval, "used": used}
    return by_modality


def shuffled(samples: Sequence[Sample], modality: str, seed: int = 0) -> list[Sample]:
    """Return samples that keep everything but one modality, which they take from another sample: the control that shows
    whether a model uses it.

    Args:
        modality: ``text``, ``image`` (with films) or ``audio``.

    Raises:
        ValueError: for another modality, or fewer than two samples.
    """
    fields: dict[str, tuple[str, ...]] = {"text": ("text",), "image": ("images", "video"), "audio": ("audio",)}
    if modality not in fields or len(samples) < 2:
        raise ValueError(
            f"modality must be text, image or audio, and samples two or more, got {modality!r}, {len(samples)}"
        )
    order = np.random.default_rng(seed).permutation(len(samples))
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)  # one cycle: nothing stays where it was
    return [
        replace(sample, **{name: getattr(samples[source[i]], name) for name in fields[modality]})
        for i, sample in enumerate(samples)
    ]


def judge_model(
    model: Any, collator: Collator, samples: Sequence[Sample], settings: TrainSettings, progress: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a trained model, with controls.

    Returns:
        Metrics, chance and controls, by these names; and a row for each prediction.
    """
    task, evaluation = collator.task, settings.evaluation
    options: dict[str, Any] = dict(batch_size=evaluation.batch_size, seed=settings.seed + 1)
    options |= dict(progress=progress, generation=evaluation.generation)
    if task.needs_targets_to_evaluate:
        collator.with_targets = True
    intact = evaluate(model, collator, samples, **options)
    rows = []
    for sample, prediction in zip(samples, intact.predictions, strict=False):
        reference = task.reference(collator, sample)
        rows.append({"name": sample.name, "text": sample.text, "reference": reference, "prediction": prediction})
    modalities = evaluation.controls if intact.scores.size else []
    return {
        "metrics": intact.metrics,
        "chance": task.chance(collator, samples, intact),
        "controls": controls(model, collator, samples, intact, modalities, **options),
    }, rows
