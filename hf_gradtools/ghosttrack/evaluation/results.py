"""What a cross-validation found: scores out of fold, and the tables that follow from them."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.ghosttrack.evaluation.statistics import (
    Interval,
    PairedDifference,
    bootstrap_auroc,
    paired_difference,
    threshold_metrics,
)


if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["CrossValidation", "MethodMetrics"]


@dataclass(frozen=True)
class MethodMetrics:
    """One method on one set of rows.

    Attributes:
        method (`str`), category (`str`, *optional*): whose, and on which rows (`None`: all).
        rows, groups (`int`): how many.
        auroc ([`Interval`]): over pairs of rows of one fold; NaN if no fold has rows of both labels.
        accuracy, precision, recall, f1 (`float`): at thresholds from the training folds.
    """

    method: str
    category: str | None
    rows: int
    groups: int
    auroc: Interval
    accuracy: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Result of [`cross_validate`].

    Attributes:
        labels, groups, folds, categories (`[T]`): of the rows; categories may be `None`.
        scores, predicted (`dict`): method -> out-of-fold scores `[T]`, and 0 or 1 at the threshold of the fold.
        choices (`dict`): method -> per fold, what the inner cross-validation chose.
        baseline (`str`, *optional*): the method with which others are compared.
        resamples, confidence, seed: of the bootstrap.
    """

    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    categories: np.ndarray | None
    scores: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    choices: dict[str, list[dict[str, Any]]]
    baseline: str | None
    resamples: int
    confidence: float
    seed: int

    @cached_property
    def table(self) -> list[MethodMetrics]:
        """Metrics of each method over all rows."""
        return [self._metrics(method, None) for method in self.scores]

    @cached_property
    def category_table(self) -> list[MethodMetrics]:
        """Metrics of each method per category; empty without categories."""
        names = [] if self.categories is None else np.unique(self.categories)
        return [self._metrics(method, name) for name in names for method in self.scores]

    @cached_property
    def baseline_differences(self) -> dict[str, PairedDifference]:
        """Each other method's AUROC minus the baseline's; empty if none was named."""
        return {} if self.baseline is None else self.differences(self.baseline)

    def differences(self, baseline: str) -> dict[str, PairedDifference]:
        """Each other method's AUROC minus `baseline`'s, on the same resampled groups."""
        if baseline not in self.scores:
            raise ValueError(f"baseline={baseline!r} is no method. Pass one of {', '.join(self.scores)}.")
        theirs = self.scores[baseline]
        return {
            method: paired_difference(self.labels, ours, theirs, self.groups, strata=self.folds, **self._bootstrap)
            for method, ours in self.scores.items()
            if method != baseline
        }

    def to_dataset(self) -> Dataset:
        """A row per text: label, group, fold, category, and per method `<method>` (score), `<method>_predicted`."""
        from datasets import Dataset

        columns: dict[str, Any] = {"label": self.labels, "group": self.groups.tolist(), "fold": self.folds}
        if self.categories is not None:
            columns["category"] = self.categories.tolist()
        for method in self.scores:
            columns |= {method: self.scores[method], f"{method}_predicted": self.predicted[method]}
        return Dataset.from_dict(columns)

    def to_markdown(self) -> str:
        """The tables for people."""
        percent = f"{self.confidence:.0%} CI".replace("%", " %")
        parts = [_markdown(["method"], [([row.method], row) for row in self.table], percent)]
        if self.baseline_differences:
            lines = [f"| method | AUROC − {self.baseline} | {percent} | share below 0 |", "|---|---|---|---|"]
            lines += [
                f"| {method} | {d.estimate:+.3f} | [{d.low:+.3f}, {d.high:+.3f}] | {d.share_below_zero:.3f} |"
                for method, d in self.baseline_differences.items()
            ]
            parts.append("\n".join(lines))
        if self.category_table:
            rows = [([str(row.category), row.method], row) for row in self.category_table]
            parts.append(_markdown(["category", "method"], rows, percent))
        note = (
            f"{len(self.labels)} texts, {len(np.unique(self.groups))} groups kept whole in {self.folds.max() + 1} "
            f"folds; AUROC over pairs within a fold; {percent} from {self.resamples} resamples of groups."
        )
        return "\n\n".join([*parts, note]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Tables, choices and scores as JSON has them; NaN becomes `None`."""
        differences = {method: asdict(difference) for method, difference in self.baseline_differences.items()}
        value = {
            "table": [asdict(row) for row in self.table],
            "category_table": [asdict(row) for row in self.category_table],
            "baseline": self.baseline,
            "differences": differences,
            "choices": self.choices,
            "resamples": self.resamples,
            "confidence": self.confidence,
            "seed": self.seed,
            "rows": self.to_dataset().to_dict(),
        }
        return _without_nan(value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes [`to_dict`] as one JSON file, whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(Path(path), self.to_dict())

    @property
    def _bootstrap(self) -> dict[str, Any]:
        return {"resamples": self.resamples, "confidence": self.confidence, "seed": self.seed}

    def _metrics(self, method: str, category: Any) -> MethodMetrics:
        rows = np.arange(len(self.labels)) if category is None else np.flatnonzero(self.categories == category)
        labels, groups = self.labels[rows], self.groups[rows]
        scores, folds = self.scores[method][rows], self.folds[rows]
        return MethodMetrics(
            method=method,
            category=None if category is None else str(category),
            rows=len(rows),
            groups=len(np.unique(groups)),
            auroc=bootstrap_auroc(labels, scores, groups, strata=folds, **self._bootstrap),
            **threshold_metrics(labels, self.predicted[method][rows]),
        )


def _markdown(heads: list[str], rows: list[tuple[list[str], MethodMetrics]], percent: str) -> str:
    heads = [*heads, "texts", "AUROC", percent, "accuracy", "precision", "recall", "F1"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for names, row in rows:
        area = row.auroc
        numbers = [row.accuracy, row.precision, row.recall, row.f1]
        cells = [*(name.replace("|", "\\|") for name in names), str(row.rows)]
        cells += ["one label only", "–"] if math.isnan(area.estimate) else [f"{area.estimate:.3f}", _range(area)]
        lines.append("| " + " | ".join([*cells, *(f"{number:.3f}" for number in numbers)]) + " |")
    return "\n".join(lines)


def _range(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
