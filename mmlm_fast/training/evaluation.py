"""Evaluation of a model on samples: metrics, confidence intervals, and controls in which a modality is shuffled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmlm_fast.models.base import VALUES
from mmlm_fast.training import metrics
from mmlm_fast.training.samples import Sample
from mmlm_fast.training.tasks import Collator, match_of, shuffled


@dataclass
class Evaluation:
    """What came out.

    Attributes:
        metrics: By name; with the interval of the first in ``<name>_interval``.
        scores: One number a sample, of the first metric; NaN for one that has nothing to be judged (retrieval).
        predictions: What the model said of each sample; empty for retrieval and pre-training.
    """

    metrics: dict[str, Any]
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    predictions: list[Any] = field(default_factory=list)


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
    kind = collator.task.kind
    try:
        with torch.no_grad():
            if kind == "classification":
                return _classification(model, collator, samples, batches)
            if kind == "generation":
                return _generation(model, collator, samples, batches, generation or {})
            if kind == "retrieval":
                return _retrieval(model, collator, samples, batches)
            return _losses(model, batches)
    finally:
        model.train(was_training)


def controls(
    model: Any,
    collator: Collator,
    samples: Sequence[Sample],
    intact: Evaluation,
    modalities: Sequence[str],
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """For each modality the metrics with that modality shuffled among the samples, and the interval of what is lost.

    ``used`` says whether the interval of the mean score lost lies above 0: the model uses the modality; None where too
    few samples are judged for an interval.
    """
    name = collator.task.metrics[0]
    found = {}
    for modality in modalities:
        control = evaluate(model, collator, shuffled(samples, modality), **options)
        lost = intact.scores - control.scores
        lost = lost[~np.isnan(lost)]
        interval = metrics.interval_of("loss", -lost if name in ("wer", "cer") else lost)
        between = interval["loss_interval"]
        found[modality] = {"metrics": control.metrics, **interval, "used": None if between is None else between[0] > 0}
    return found


def _batches(
    model: Any, collator: Collator, samples: Sequence[Sample], batch_size: int, progress: bool
) -> Iterator[dict[str, Any]]:
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="evaluating", disable=not progress, leave=False, unit="batch"):
        batch = collator(samples[start : start + batch_size])
        yield {name: value.to(model.device) for name, value in batch.items()}


def _classification(model: Any, collator: Collator, samples: Sequence[Sample], batches: Any) -> Evaluation:
    logits = torch.cat([model(**batch).logits.float().cpu() for batch in batches])
    truth = [collator.label_of(sample) for sample in samples]
    if collator.regression:
        predicted = logits[:, 0].numpy()
        errors = np.abs(predicted - np.array(truth))
        return Evaluation({"mean_absolute_error": float(errors.mean())}, -errors, predicted.tolist())
    if collator.several:
        chosen = (logits > 0).int().numpy()
        found = metrics.multi_label(np.array(truth, int), chosen, collator.labels)
        scores = (chosen == np.array(truth, int)).all(1).astype(float)
        said: list[Any] = [[collator.labels[i] for i in np.flatnonzero(row)] for row in chosen]
    else:
        guess = logits.argmax(-1).tolist()
        found = metrics.classification(truth, guess, collator.labels)
        scores = np.array([t == g for t, g in zip(truth, guess, strict=True)], float)
        said = [collator.labels[i] for i in guess]
    return Evaluation(found | metrics.interval_of("accuracy", scores), scores, said)


def _generation(
    model: Any, collator: Collator, samples: Sequence[Sample], batches: Any, options: dict[str, Any]
) -> Evaluation:
    tokenizer = collator.processor.tokenizer
    options = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": tokenizer.pad_token_id} | options
    said: list[str] = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        made = model.generate(**inputs, **options)
        if collator.model_kind == "decoder":
            made = made[:, batch["input_ids"].shape[1] :]
        said += tokenizer.batch_decode(made, skip_special_tokens=True)
    references = [collator.target(sample) for sample in samples]
    found: dict[str, Any] = {name: metrics.text(name, references, said) for name in collator.task.metrics}
    first = collator.task.metrics[0]
    scores = metrics.text_scores(first, references, said)
    return Evaluation(found | metrics.interval_of(first, scores), scores, said)


def _retrieval(model: Any, collator: Collator, samples: Sequence[Sample], batches: Any) -> Evaluation:
    """Each modality against all different texts, both ways. What stands at the top, and the scores, are the mean over
    the modalities that look for their text."""
    given = [m for m in VALUES if m in collator.modalities]
    parts: dict[str, list[torch.Tensor]] = {m: [] for m in ("text", *given)}
    for batch in batches:
        out = model(**batch, return_loss=False)
        like = out.text_embeds
        for modality, found_so_far in parts.items():
            embeds = out[f"{modality}_embeds"] if f"{modality}_embeds" in out else torch.zeros_like(like)
            found_so_far.append(embeds.float().cpu())
    embeds = {modality: torch.cat(rows).numpy() for modality, rows in parts.items()}
    texts = [sample.text for sample in samples]
    first_row = np.array([texts.index(text) for text in dict.fromkeys(texts)])
    keys = [match_of(sample) for sample in samples]
    matches = np.array([[key == keys[row] for row in first_row] for key in keys])
    found: dict[str, Any] = {}
    forward_by_modality, hits_by_sample = [], np.full((len(given), len(samples)), np.nan)
    for row, modality in enumerate(given):
        there = np.abs(embeds[modality]).sum(1) > 0
        if not there.any():
            continue
        similarity = embeds[modality][there] @ embeds["text"][first_row].T
        positive = matches[there]
        forward, hits = metrics.retrieval(similarity, positive)
        asked = positive.any(0)
        backward, _ = metrics.retrieval(similarity.T[asked], positive.T[asked])
        forward_by_modality.append(forward)
        hits_by_sample[row, there] = hits
        found[f"{modality}_to_text"], found[f"text_to_{modality}"] = forward, backward
    if not forward_by_modality:
        raise ValueError("retrieval needs pictures or clips, got none")
    there = ~np.isnan(hits_by_sample).all(0)
    scores = np.full(len(samples), np.nan)
    scores[there] = np.nanmean(hits_by_sample[:, there], 0)
    mean = {name: float(np.mean([f[name] for f in forward_by_modality])) for name in forward_by_modality[0]}
    return Evaluation(mean | metrics.interval_of("recall_at_1", scores[there]) | found, scores)


def _losses(model: Any, batches: Any) -> Evaluation:
    sums: dict[str, list[float]] = {}
    for batch in batches:
        out = model(**batch)
        for name in out:
            if name.endswith("loss") and out[name] is not None:
                sums.setdefault(name, []).append(float(out[name]))
    return Evaluation({name: float(np.mean(values)) for name, values in sums.items()})
