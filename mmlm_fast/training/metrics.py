"""What predictions are worth: metrics of scikit-learn, jiwer and sacrebleu, with confidence intervals of SciPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
RECALL_AT = (1, 5, 10)
ERROR_RATES = ("wer", "cer")  # of which less is better


def classification(truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, macro_f1 (over the classes that occur), and scikit-learn's classification report as text."""
    from sklearn.metrics import accuracy_score, classification_report, f1_score

    occurring = sorted(set(truth) | set(predicted))
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth)), zero_division=0)),
        "classification_report": classification_report(
            truth, predicted, labels=occurring, target_names=[str(labels[i]) for i in occurring], zero_division=0
        ),
    }


def multi_label(truth: Any, predicted: Any, labels: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy of whole samples, macro_f1 over classes, and the report."""
    from sklearn.metrics import accuracy_score, classification_report, f1_score

    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "classification_report": classification_report(
            truth, predicted, target_names=[str(x) for x in labels], zero_division=0
        ),
    }


def text(name: str, references: Sequence[str], predictions: Sequence[str]) -> float:
    """Compute one of wer, cer, bleu, chrf, exact_match over all samples: 0 to 1, error rates possibly more; bleu and
    chrf 0 to 100, as sacrebleu gives them."""
    if name in ERROR_RATES:
        import jiwer

        return float(getattr(jiwer, name)(list(references), list(predictions)))
    if name in ("bleu", "chrf"):
        import sacrebleu

        of = sacrebleu.corpus_bleu if name == "bleu" else sacrebleu.corpus_chrf
        return float(of(list(predictions), [list(references)]).score)
    assert name == "exact_match", name
    return float(np.mean([same(r, p) for r, p in zip(references, predictions, strict=True)]))


def same(reference: str, prediction: str) -> bool:
    """Return whether two texts are the same but for surrounding space."""
    return reference.strip() == prediction.strip()


def text_scores(name: str, references: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """Score each sample, for confidence intervals: word or character errors as a share of the reference (wer, cer),
    sentence chrF (chrf, bleu), or 0 and 1."""
    if name in (*ERROR_RATES, "exact_match"):
        return np.array([text(name, [r], [p]) for r, p in zip(references, predictions, strict=True)])
    import sacrebleu

    return np.array([sacrebleu.sentence_chrf(p, [r]).score for r, p in zip(references, predictions, strict=True)])


def retrieval(similarity: np.ndarray, positive: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Compute recall at 1, 5 and 10, and how well matching pairs are told from others.

    Args:
        similarity: ``[queries, candidates]``.
        positive: Bool, the same shape: which candidates are right; a query needs one.

    Returns:
        ``recall_at_k``: share of the queries with a right candidate among the k most similar (ties count against);
        ``matching_auc``: area under the ROC curve over all pairs; ``chance_at_1``: of a random candidate. And the
        recall at 1 of each query.
    """
    from sklearn.metrics import roc_auc_score

    if similarity.shape != positive.shape or not positive.any(1).all():
        raise ValueError(f"every query needs a right candidate; shapes {similarity.shape} and {positive.shape}")
    best = np.where(positive, similarity, -np.inf).max(1, keepdims=True)
    rank = (np.where(positive, -np.inf, similarity) >= best).sum(1)
    values = {f"recall_at_{k}": float((rank < k).mean()) for k in RECALL_AT}
    values["matching_auc"] = float(roc_auc_score(positive.ravel(), similarity.ravel())) if not positive.all() else 1.0
    values["chance_at_1"] = float(positive.mean(1).mean())
    return values, (rank == 0).astype(float)


def interval(scores: np.ndarray) -> tuple[float, float] | None:
    """Compute the bootstrap percentile interval of the mean, at `CONFIDENCE`; the mean itself where all are equal, None
    of fewer than two scores, which say nothing of others."""
    from scipy.stats import bootstrap

    scores = np.asarray(scores, float)
    if len(scores) < 2:
        return None
    if np.ptp(scores) == 0:
        return float(scores.mean()), float(scores.mean())
    options = dict(n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="percentile", rng=0)
    bounds = bootstrap((scores,), np.mean, **options).confidence_interval
    return float(bounds.low), float(bounds.high)


def interval_of(name: str, scores: np.ndarray) -> dict[str, list[float] | None]:
    """Return the interval of a metric, by its name."""
    bounds = interval(scores)
    return {f"{name}_interval": None if bounds is None else list(bounds)}
