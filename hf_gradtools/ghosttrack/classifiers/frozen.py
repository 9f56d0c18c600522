"""Fitted classifiers as numpy arrays: what is evaluated is what is saved, and predicting needs no scikit-learn.

Shape letters: T rows (texts), P features given, C features used, N nodes of all trees, M trees.

Each kind lists its arrays in `ARRAYS` (name -> dtype and axes); [`classifier_files`] stores and checks by that list.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np


__all__ = ["Features", "FrozenClassifier", "FrozenEnsemble", "FrozenLinear", "FrozenTrees", "check_features"]

Features: TypeAlias = Any  # np.ndarray or scipy sparse matrix, [T, P]

CHUNK_VALUES = 2**22  # rows x trees, or rows x features, held at a time
LEAF = -1


def is_sparse(features: Features) -> bool:
    """Whether this is a scipy sparse matrix; scipy is not imported, since who has none has it imported not."""
    module = sys.modules.get("scipy.sparse")
    return module is not None and bool(module.issparse(features))


def check_features(features: Features, n_features: int | None = None, name: str = "features") -> Features:
    """`features` as float64, dense C-contiguous or sparse CSR.

    Raises:
        ValueError: not `[T, P]`, not the expected P, or a value that is no finite number.
    """
    if is_sparse(features):
        features = features.tocsr().astype(np.float64)
        values = features.data
    else:
        features = values = np.ascontiguousarray(features, dtype=np.float64)
    if len(features.shape) != 2 or (n_features is not None and features.shape[1] != n_features):
        need = "[T, P]" if n_features is None else f"[T, {n_features}]"
        raise ValueError(f"{name} has shape {list(features.shape)}; need {need}. Pass one row of features per text.")
    if not np.isfinite(values).all():
        at = np.flatnonzero(~np.isfinite(values).ravel())[0]
        row = np.searchsorted(features.indptr, at, "right") - 1 if is_sparse(features) else at // values.shape[1]
        raise ValueError(f"{name} has NaN or infinity in row {int(row)}. Drop the row or give it a value.")
    return features


def dense_columns(features: Features, columns: np.ndarray) -> np.ndarray:
    """The named columns as a dense float64 array `[T, C]`."""
    chosen = features[:, columns]
    return chosen.toarray() if is_sparse(chosen) else chosen


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenClassifier:
    """A fitted classifier of label 1 against 0.

    Attributes:
        n_features (`int`): P of the rows that it takes.
        metadata (`dict`): what its maker wants to keep with it, as JSON has it (feature names, threshold, ...).
    """

    KIND: ClassVar[str]
    ARRAYS: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]]

    n_features: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def predict_proba(self, features: Features) -> np.ndarray:
        """Probabilities of label 0 and label 1, `[T, 2]`, for features `[T, P]`, dense or scipy sparse."""
        positive = self._positive(check_features(features, self.n_features))
        return np.stack([1 - positive, positive], axis=1)

    def scores(self, features: Features) -> np.ndarray:
        """Probability of label 1, `[T]`."""
        return self.predict_proba(features)[:, 1]

    def check(self) -> None:
        """Raises `ValueError` where arrays contradict each other; types and shapes have been checked before."""
        raise NotImplementedError

    def _positive(self, features: Features) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenLinear(FrozenClassifier):
    """Logistic regression on scaled columns: sigmoid(((x[columns] - mean) / scale) · coef + intercept)."""

    KIND: ClassVar[str] = "linear"
    ARRAYS: ClassVar = {
        "columns": ("int64", ("C",)),
        "mean": ("float64", ("C",)),
        "scale": ("float64", ("C",)),
        "coef": ("float64", ("C",)),
        "intercept": ("float64", ()),
    }

    columns: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    coef: np.ndarray
    intercept: np.ndarray

    def check(self) -> None:
        _check_columns(self.columns, self.n_features)
        if not (self.scale > 0).all():
            raise ValueError("array 'scale' has values that are not positive")

    def _positive(self, features: Features) -> np.ndarray:
        if is_sparse(features) and not self.mean.any():
            return _sigmoid(features[:, self.columns] @ (self.coef / self.scale) + self.intercept)
        parts = [
            ((dense_columns(rows, self.columns) - self.mean) / self.scale) @ self.coef
            for rows in _row_chunks(features, len(self.columns))
        ]
        return _sigmoid(np.concatenate(parts) + self.intercept)


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenTrees(FrozenClassifier):
    """Decision trees laid end to end; a row goes left where its feature is at most the threshold.

    Attributes:
        columns (`[C]`): the features used; `feature` counts within them.
        roots (`[M]`): where each tree begins. A child comes after its parent.
        left, right (`[N]`): children, -1 in a leaf. value (`[N]`): what a leaf adds.
        boosted (`bool`): sigmoid(baseline + sum of values), else the mean of the values, which are probabilities.
        single_precision (`bool`): features are rounded to float32 before they are compared.
    """

    KIND: ClassVar[str] = "trees"
    ARRAYS: ClassVar = {
        "columns": ("int64", ("C",)),
        "roots": ("int64", ("M",)),
        "feature": ("int64", ("N",)),
        "left": ("int64", ("N",)),
        "right": ("int64", ("N",)),
        "threshold": ("float64", ("N",)),
        "value": ("float64", ("N",)),
        "baseline": ("float64", ()),
    }

    columns: np.ndarray
    roots: np.ndarray
    feature: np.ndarray
    left: np.ndarray
    right: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    baseline: np.ndarray
    boosted: bool
    single_precision: bool

    def check(self) -> None:
        _check_columns(self.columns, self.n_features)
        n_nodes, inner = len(self.left), self.left != LEAF
        index = np.arange(n_nodes)
        for name in ("left", "right"):
            child = getattr(self, name)
            if (inner != (child != LEAF)).any() or (child[inner] <= index[inner]).any() or (child >= n_nodes).any():
                raise ValueError(f"array {name!r} has children that are not later nodes")
        if not len(self.roots) or ((self.roots < 0) | (self.roots >= n_nodes)).any():
            raise ValueError("array 'roots' names nodes that do not exist")
        if ((self.feature < 0) | (self.feature >= len(self.columns)))[inner].any():
            raise ValueError("array 'feature' names columns that do not exist")
        if not self.boosted and ((self.value < 0) | (self.value > 1))[~inner].any():
            raise ValueError("array 'value' has leaves that are no probabilities")

    def _positive(self, features: Features) -> np.ndarray:
        per_row = max(len(self.roots), len(self.columns))
        sums = np.concatenate([self._sums(rows) for rows in _row_chunks(features, per_row)])
        return _sigmoid(sums + self.baseline) if self.boosted else sums / len(self.roots)

    def _sums(self, features: Features) -> np.ndarray:
        values = dense_columns(features, self.columns)
        if self.single_precision:
            values = values.astype(np.float32)
        nodes = np.broadcast_to(self.roots, (len(values), len(self.roots))).copy()
        row, tree = np.nonzero(self.left[nodes] != LEAF)
        while len(row):
            at = nodes[row, tree]
            goes_left = values[row, self.feature[at]] <= self.threshold[at]
            at = np.where(goes_left, self.left[at], self.right[at])
            nodes[row, tree] = at
            on = self.left[at] != LEAF
            row, tree = row[on], tree[on]
        return self.value[nodes].sum(axis=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenEnsemble(FrozenClassifier):
    """Soft vote: the mean of its members' probabilities."""

    KIND: ClassVar[str] = "ensemble"
    ARRAYS: ClassVar = {}

    members: Sequence[FrozenClassifier]

    def check(self) -> None:
        if not self.members:
            raise ValueError("the ensemble has no members")

    def _positive(self, features: Features) -> np.ndarray:
        return np.mean([member._positive(features) for member in self.members], axis=0)


def _check_columns(columns: np.ndarray, n_features: int) -> None:
    if ((columns < 0) | (columns >= n_features)).any():
        raise ValueError(f"array 'columns' names columns outside of the {n_features} features")


def _row_chunks(features: Features, values_per_row: int) -> list[Features]:
    size = max(1, CHUNK_VALUES // max(1, values_per_row))
    return [features[start : start + size] for start in range(0, max(1, features.shape[0]), size)]


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)
