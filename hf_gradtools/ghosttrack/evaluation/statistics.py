"""How good a score is and how sure that is: AUROC, metrics at a threshold, bootstrap over groups.

Shape letters: T rows (texts), G groups (questions), R resamples.

Rows of one group are not independent, so a resample draws groups, with all their rows. A resample is a weight per row
(how often its group was drawn), and every metric here is a function of weights: R resamples cost one cumulative sum
over `[R, T]`. Pure functions of numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradtools.ghosttrack.labels import check_labels


__all__ = [
    "Interval",
    "PairedDifference",
    "auroc",
    "best_threshold",
    "bootstrap_auroc",
    "paired_difference",
    "threshold_metrics",
]

CHUNK_VALUES = 2**20  # weights held at a time, in resamples x rows
OBJECTIVES = ("youden", "accuracy", "f1")


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap confidence interval (percentiles)."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """AUROC of one score minus AUROC of another on the same rows.

    Attributes:
        estimate (`float`): the difference on the rows as they are.
        mean (`float`): its mean over the resamples.
        low, high (`float`): its confidence interval.
        share_below_zero (`float`): share of the resamples in which the first score was worse.
    """

    estimate: float
    mean: float
    low: float
    high: float
    share_below_zero: float


def auroc(labels: Any, scores: Any, strata: Any = None) -> float:
    """Share of the pairs (row of label 1, row of label 0) in which the first has the higher score; ties count half.

    Args:
        labels (`[T]`): 0 or 1.
        scores (`[T]`): the higher, the more likely label 1.
        strata (`[T]`, *optional*): only pairs within one stratum count. With the fold as stratum, scores of models
            that were fitted on different rows are never compared: pooled, their offsets follow the label shares of
            the *other* folds and push an honest null below 0.5.

    Returns:
        `float`: NaN if no stratum has rows of both labels.
    """
    labels, scores = _pair("scores", labels, scores)
    return float(_PairCounts(labels, scores, strata)(np.ones((1, len(labels))))[0])


def threshold_metrics(labels: Any, predicted: Any) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of label 1 (0 where nothing was predicted, as in scikit-learn).

    Args:
        labels (`[T]`): 0 or 1.
        predicted (`[T]`): 0 or 1, or booleans.
    """
    labels, predicted = _pair("predicted", labels, np.asarray(predicted).astype(np.float64))
    hits = float((labels * predicted).sum())
    claimed, actual = float(predicted.sum()), float(labels.sum())
    return {
        "accuracy": float((labels == predicted).mean()),
        "precision": hits / claimed if claimed else 0.0,
        "recall": hits / actual if actual else 0.0,
        "f1": 2 * hits / (claimed + actual) if claimed + actual else 0.0,
    }


def best_threshold(labels: Any, scores: Any, objective: str = "youden") -> float:
    """The threshold t for which `scores >= t` predicts label 1 best on these rows.

    Args:
        labels, scores (`[T]`): as in [`auroc`].
        objective (`str`, defaults to `"youden"`): `"youden"` (recall of both labels alike), `"accuracy"` or `"f1"`.

    Returns:
        `float`: midway between two neighbouring scores, so that rows between them are split evenly.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown. Pass one of {', '.join(OBJECTIVES)}.")
    labels, scores = _pair("scores", check_labels(labels), scores)
    values, inverse = np.unique(scores, return_inverse=True)
    positives = np.bincount(inverse, weights=labels)[::-1].cumsum()[::-1]  # label 1 at or above each value
    negatives = np.bincount(inverse, weights=1 - labels)[::-1].cumsum()[::-1]
    n_positive, n_negative = positives[0], negatives[0]
    if objective == "youden":
        quality = positives / n_positive - negatives / n_negative
    elif objective == "accuracy":
        quality = positives + n_negative - negatives
    else:
        quality = 2 * positives / (positives + negatives + n_positive)
    best = int(quality.argmax())
    return float(values[0] if best == 0 else (values[best - 1] + values[best]) / 2)


def bootstrap_auroc(
    labels: Any,
    scores: Any,
    groups: Any,
    *,
    strata: Any = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """AUROC with a confidence interval from resampled groups.

    Args:
        labels, scores, strata (`[T]`): as in [`auroc`].
        groups (`[T]`): rows of one group (question) are drawn together.
        resamples (`int`, defaults to 2000): number of draws of G groups out of G.
        confidence (`float`, defaults to 0.95): of the interval.
        seed (`int`, defaults to 0): of the draws.
    """
    labels, scores = _pair("scores", labels, scores)
    count = _PairCounts(labels, scores, strata)
    draws = np.concatenate([count(weights) for weights in _group_weights(groups, len(labels), resamples, seed)])
    return Interval(auroc(labels, scores, strata), *_bounds(draws, confidence))


def paired_difference(
    labels: Any,
    scores: Any,
    baseline_scores: Any,
    groups: Any,
    *,
    strata: Any = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """AUROC of `scores` minus AUROC of `baseline_scores`, both on the same resampled groups; see [`bootstrap_auroc`].

    Ties between the two in a resample count half in `share_below_zero`.
    """
    labels, scores = _pair("scores", labels, scores)
    _, baseline_scores = _pair("baseline_scores", labels, baseline_scores)
    ours, theirs = _PairCounts(labels, scores, strata), _PairCounts(labels, baseline_scores, strata)
    weights = _group_weights(groups, len(labels), resamples, seed)
    draws = np.concatenate([ours(chunk) - theirs(chunk) for chunk in weights])
    estimate = auroc(labels, scores, strata) - auroc(labels, baseline_scores, strata)
    share = float(np.nanmean((draws < 0) + 0.5 * (draws == 0)))
    return PairedDifference(estimate, float(np.nanmean(draws)), *_bounds(draws, confidence), share)


class _PairCounts:
    """AUROC under row weights `[R, T]`; everything that does not depend on the weights is done once."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, strata: Any) -> None:
        strata = np.zeros(len(labels), int) if strata is None else np.unique(strata, return_inverse=True)[1]
        if len(strata) != len(labels):
            raise ValueError(f"strata has {len(strata)} rows; labels has {len(labels)}. Pass one stratum per row.")
        self.order = np.lexsort((scores, strata))
        scores, strata, self.labels = scores[self.order], strata[self.order], labels[self.order].astype(float)
        new_stratum = np.r_[True, strata[1:] != strata[:-1]]
        new_value = new_stratum | np.r_[True, scores[1:] != scores[:-1]]
        stratum_starts, tie_starts = np.flatnonzero(new_stratum), np.flatnonzero(new_value)
        self.positives = np.flatnonzero(self.labels)
        tie = (new_value.cumsum() - 1)[self.positives]
        self.tie_start, self.tie_end = tie_starts[tie], np.r_[tie_starts[1:], len(labels)][tie]
        stratum = (new_stratum.cumsum() - 1)[self.positives]
        self.stratum_start = stratum_starts[stratum]
        self.stratum_end = np.r_[stratum_starts[1:], len(labels)][stratum]

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """`[R, T]` -> `[R]`."""
        weights = weights[:, self.order]
        negatives = np.zeros((weights.shape[0], weights.shape[1] + 1))  # weight of label 0 before each row
        np.cumsum(weights * (1 - self.labels), axis=1, out=negatives[:, 1:])
        before = negatives[:, self.stratum_start]
        above = 0.5 * (negatives[:, self.tie_start] + negatives[:, self.tie_end]) - before
        pairs = negatives[:, self.stratum_end] - before
        positive = weights[:, self.positives]
        total = np.einsum("rp,rp->r", positive, pairs)
        won = np.einsum("rp,rp->r", positive, above)
        return np.divide(won, total, out=np.full(len(total), np.nan), where=total > 0)


def _group_weights(groups: Any, n_rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, `[R, T]` in chunks of resamples."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1.")
    names, group_of_row = np.unique(groups, return_inverse=True)
    if len(group_of_row) != n_rows:
        raise ValueError(f"groups has {len(group_of_row)} rows; labels has {n_rows}. Pass one group id per row.")
    generator, n_groups = np.random.default_rng(seed), len(names)
    chunk = max(1, CHUNK_VALUES // n_rows)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(n_groups, size=(size, n_groups)) + n_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n_groups).reshape(size, n_groups)
        yield counts[:, group_of_row].astype(np.float64)


def _bounds(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1). Pass 0.95 for a 95 % interval.")
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _pair(name: str, labels: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    labels, values = np.asarray(labels), np.asarray(values, dtype=np.float64)
    if values.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name} has shape {values.shape}, labels {labels.shape}; need one of each per row, [T].")
    if np.isnan(values).any():
        raise ValueError(f"{name} is NaN in row {int(np.isnan(values).argmax())}. Drop the row or give it a value.")
    return labels, values
