"""Detectors' classifiers: what scikit-learn fits, exported at once to arrays that we predict with and can save.

A classifier here is a recipe without state: `fit` returns a [`FrozenClassifier`]. Everything that depends on data
(which columns, their scale, principal components) is fitted inside `fit`, so a harness that gives it the training
rows alone cannot leak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import numpy as np

from hf_gradtools.ghosttrack.classifiers.frozen import (
    LEAF,
    Features,
    FrozenClassifier,
    FrozenEnsemble,
    FrozenLinear,
    FrozenTrees,
    check_features,
    dense_columns,
    is_sparse,
)
from hf_gradtools.ghosttrack.labels import check_labels


__all__ = [
    "CLASSIFIERS",
    "Classifier",
    "Ensemble",
    "GradientBoosting",
    "LogisticRegression",
    "RandomForest",
    "make_classifier",
    "univariate_scores",
]

SCALINGS = ("auto", "std", "max", "none")
PROBED_ROWS = 64  # training rows on which the exported arrays must equal scikit-learn
EXPORT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Classifier:
    """A recipe for a classifier of label 1 against 0.

    Args:
        seed (`int`, defaults to 0): of what the fit draws.
        select (`int`, *optional*): use the so many columns that differ most between the labels on the rows given
            to `fit` (largest |t|). `None`: all that are not constant.
    """

    seed: int = 0
    select: int | None = None

    def __post_init__(self) -> None:
        if self.select is not None and self.select < 1:
            raise ValueError(f"select={self.select} must be at least 1 column, or None for all.")

    def fit(self, features: Features, labels: Any) -> FrozenClassifier:
        """Fits on features `[T, P]` (dense or scipy sparse) and labels `[T]` of both kinds.

        Raises:
            ImportError: scikit-learn is not installed.
            ValueError: shapes differ, a feature is not finite, or there is one label only.
        """
        features, labels = check_features(features), check_labels(labels)
        if len(labels) != features.shape[0]:
            raise ValueError(f"labels has {len(labels)} rows, features {features.shape[0]}. Pass one label per row.")
        return self._fit(features, labels)

    def candidates(self) -> list[Classifier]:
        """The recipes among which an inner cross-validation should choose; this one alone if nothing is open."""
        return [self]

    def tuned_by(self) -> Classifier:
        """The (cheaper) recipe whose candidates decide this one's open options."""
        return self

    def decided(self, choice: Classifier) -> Classifier:
        """This recipe with the options of `choice`, one of `tuned_by().candidates()`."""
        return choice

    def _fit(self, features: Features, labels: np.ndarray) -> FrozenClassifier:
        raise NotImplementedError

    def _columns(self, features: Features, labels: np.ndarray) -> np.ndarray:
        """The columns to use, ascending."""
        merit = univariate_scores(features, labels)
        useful = np.flatnonzero(merit >= 0)
        if self.select is not None and len(useful) > self.select:
            useful = useful[np.argsort(-merit[useful], kind="stable")[: self.select]]
        return np.sort(useful)


@dataclass(frozen=True)
class LogisticRegression(Classifier):
    """Logistic regression with L2 penalty on scaled columns; sparse input stays sparse.

    Args:
        C (`float` or tuple of them, defaults to `(0.001, 0.01, 0.1, 1.0)`): inverse penalty. Of several, an inner
            grouped cross-validation chooses (see [`fit_method`]); `fit` alone takes the middle one.
        scaling (`str`, defaults to `"auto"`): divide columns by their standard deviation (`"std"`: dense ones), by
            their largest magnitude (`"max"`: sparse ones, whose rare latents the other would blow up), or by nothing
            (`"none"`). Dense columns are also centred; for sparse ones the free intercept makes up for that.
        pca (`int`, *optional*): regress on the so many principal components of the scaled columns (dense only).
        max_iter (`int`, defaults to 2000): of L-BFGS.
    """

    C: float | tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    scaling: str = "auto"
    pca: int | None = None
    max_iter: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._penalties() or not all(penalty > 0 for penalty in self._penalties()):
            raise ValueError(f"C={self.C!r} must be positive, or a list of positive numbers to choose from.")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} is unknown. Pass one of {', '.join(SCALINGS)}.")

    def candidates(self) -> list[Classifier]:
        return [replace(self, C=penalty) for penalty in self._penalties()]

    def _penalties(self) -> list[float]:
        return [float(C) for C in self.C] if isinstance(self.C, Iterable) else [float(self.C)]

    def _fit(self, features: Features, labels: np.ndarray) -> FrozenClassifier:
        linear_model = _sklearn("linear_model")
        columns = self._columns(features, labels)
        if not len(columns):
            return _constant(features.shape[1], labels)
        chosen = features[:, columns]
        mean, scale = self._scaler(chosen)
        scaled = chosen.multiply(1 / scale).tocsr() if is_sparse(chosen) else (chosen - mean) / scale
        components = self._components(scaled)
        if components is not None:
            scaled = scaled @ components.T
        penalties = self._penalties()
        model = linear_model.LogisticRegression(C=penalties[len(penalties) // 2], max_iter=self.max_iter)
        model.fit(scaled, labels)
        coef = model.coef_[0] if components is None else model.coef_[0] @ components
        frozen = FrozenLinear(
            n_features=features.shape[1],
            columns=columns,
            mean=mean,
            scale=scale,
            coef=coef,
            intercept=np.asarray(model.intercept_[0]),
        )
        return _verified(frozen, features, model.predict_proba(scaled[:PROBED_ROWS]))

    def _scaler(self, chosen: Features) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = _moments(chosen)
        by_default = "max" if is_sparse(chosen) else "std"
        scaling = by_default if self.scaling == "auto" else self.scaling
        if scaling == "none":
            scale = np.ones_like(mean)
        elif scaling == "std":
            scale = np.sqrt(variance)
        else:
            scale = abs(chosen).max(axis=0)
            scale = scale.toarray().ravel() if is_sparse(scale) else scale
        return (np.zeros_like(mean) if is_sparse(chosen) else mean), np.where(scale > 0, scale, 1.0)

    def _components(self, scaled: Features) -> np.ndarray | None:
        if self.pca is None:
            return None
        if is_sparse(scaled) or self.pca < 1:
            raise ValueError(f"pca={self.pca} needs dense features and at least 1 component. Pass select= for sparse.")
        return np.linalg.svd(scaled, full_matrices=False)[2][: self.pca]


@dataclass(frozen=True)
class RandomForest(Classifier):
    """Random forest.

    Args:
        select (`int`, defaults to 512): as in [`Classifier`]; trees hold the columns dense.
        n_estimators (`int`, defaults to 200), min_samples_leaf (`int`, defaults to 2), max_depth (`int`, *optional*):
            as scikit-learn names them.
    """

    select: int | None = 512
    n_estimators: int = 200
    min_samples_leaf: int = 2
    max_depth: int | None = None

    def _fit(self, features: Features, labels: np.ndarray) -> FrozenClassifier:
        ensemble = _sklearn("ensemble")
        columns = self._columns(features, labels)
        if not len(columns):
            return _constant(features.shape[1], labels)
        values = dense_columns(features, columns)
        model = ensemble.RandomForestClassifier(
            n_estimators=self.n_estimators,
            min_samples_leaf=self.min_samples_leaf,
            max_depth=self.max_depth,
            random_state=self.seed,
        ).fit(values, labels)
        trees = [estimator.tree_ for estimator in model.estimators_]
        frozen = FrozenTrees(
            n_features=features.shape[1],
            columns=columns,
            baseline=np.asarray(0.0),
            boosted=False,
            single_precision=True,
            **_end_to_end(
                (tree.feature, tree.threshold, tree.children_left, tree.children_right, tree.children_left < 0, value)
                for tree in trees
                for value in [tree.value[:, 0, 1] / tree.value[:, 0].sum(axis=1)]
            ),
        )
        return _verified(frozen, features, model.predict_proba(values[:PROBED_ROWS]))


@dataclass(frozen=True)
class GradientBoosting(Classifier):
    """Gradient boosting on histograms (scikit-learn's `HistGradientBoostingClassifier`), without early stopping.

    Args:
        select (`int`, defaults to 512): as in [`Classifier`].
        max_iter (`int`, defaults to 100), learning_rate (`float`, defaults to 0.1), max_depth (`int`, defaults to 3),
            min_samples_leaf (`int`, defaults to 20): as scikit-learn names them.
    """

    select: int | None = 512
    max_iter: int = 100
    learning_rate: float = 0.1
    max_depth: int | None = 3
    min_samples_leaf: int = 20

    def _fit(self, features: Features, labels: np.ndarray) -> FrozenClassifier:
        ensemble = _sklearn("ensemble")
        columns = self._columns(features, labels)
        if not len(columns):
            return _constant(features.shape[1], labels)
        values = dense_columns(features, columns)
        model = ensemble.HistGradientBoostingClassifier(
            max_iter=self.max_iter,
            learning_rate=self.learning_rate,
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            early_stopping=False,  # it would split rows, not groups
            random_state=self.seed,
        ).fit(values, labels)
        # The trees have no public name; _verified notices if their meaning ever changes.
        trees = [predictors[0].nodes for predictors in model._predictors]
        frozen = FrozenTrees(
            n_features=features.shape[1],
            columns=columns,
            baseline=np.asarray(float(np.ravel(model._baseline_prediction)[0])),
            boosted=True,
            single_precision=False,
            **_end_to_end(
                (
                    nodes["feature_idx"],
                    nodes["num_threshold"],
                    nodes["left"],
                    nodes["right"],
                    nodes["is_leaf"] == 1,
                    nodes["value"],
                )
                for nodes in trees
            ),
        )
        return _verified(frozen, features, model.predict_proba(values[:PROBED_ROWS]))


@dataclass(frozen=True)
class Ensemble(Classifier):
    """Soft vote of random forest, gradient boosting and logistic regression, each with its own defaults.

    Args:
        select (`int`, *optional*): for all three; `None` leaves each its own.
        C (`float` or tuple of them): of the logistic regression, by which it is chosen as well.
    """

    C: float | tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)

    def tuned_by(self) -> Classifier:
        return LogisticRegression(seed=self.seed, select=self.select, C=self.C)

    def decided(self, choice: Classifier) -> Classifier:
        return replace(self, C=choice.C) if isinstance(choice, LogisticRegression) else choice

    def _fit(self, features: Features, labels: np.ndarray) -> FrozenClassifier:
        trees = {"seed": self.seed} | ({} if self.select is None else {"select": self.select})
        members = [recipe._fit(features, labels) for recipe in (RandomForest(**trees), GradientBoosting(**trees))]
        members.append(self.tuned_by()._fit(features, labels))
        return FrozenEnsemble(n_features=features.shape[1], members=members)


CLASSIFIERS: dict[str, type[Classifier]] = {
    "random_forest": RandomForest,
    "gradient_boosting": GradientBoosting,
    "logistic_regression": LogisticRegression,
    "ensemble": Ensemble,
}


def make_classifier(name: str, seed: int = 0, **options: Any) -> Classifier:
    """A classifier by name.

    Args:
        name (`str`): `"random_forest"`, `"gradient_boosting"`, `"logistic_regression"` or `"ensemble"`.
        seed (`int`, defaults to 0): of what its fit draws.
        options: fields of that class, as `select=256` or `C=0.1`.

    Raises:
        ValueError: the name or an option is unknown.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"classifier={name!r} is unknown. Pass one of {', '.join(CLASSIFIERS)}.")
    known = [field.name for field in fields(CLASSIFIERS[name])]
    if strangers := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {strangers[0]!r}. It has {', '.join(known)}.")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return CLASSIFIERS[name](seed=seed, **options)


def univariate_scores(features: Features, labels: np.ndarray) -> np.ndarray:
    """|t| of each column between the labels (equal variances), `[P]`; -1 for a constant column.

    Its order is that of the ANOVA F value.
    """
    ones = labels == 1
    n, n_one = len(labels), int(ones.sum())
    mean_one, variance_one = _moments(features[np.flatnonzero(ones)])
    mean_zero, variance_zero = _moments(features[np.flatnonzero(~ones)])
    within = (n_one * variance_one + (n - n_one) * variance_zero) / n
    difference = np.abs(mean_one - mean_zero)
    spread = np.sqrt(within * (1 / n_one + 1 / (n - n_one)))
    ceiling = difference * 1e9 + 1  # separated without spread: above all others, in order of the difference
    merit = np.divide(difference, spread, out=ceiling, where=spread > 1e-9 * difference)
    return np.where((within == 0) & (difference == 0), -1.0, merit)


def _moments(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each column; exactly 0 variance where a column is constant."""
    if not is_sparse(features):
        low = features.min(axis=0)
        constant = low == features.max(axis=0)
        mean = np.where(constant, low, features.mean(axis=0))
        return mean, np.where(constant, 0.0, ((features - mean) ** 2).mean(axis=0))
    n_rows = features.shape[0]
    mean = np.asarray(features.mean(axis=0)).ravel()
    filled = np.bincount(features.indices, minlength=features.shape[1])
    deviations = (features.data - mean[features.indices]) ** 2
    squares = np.bincount(features.indices, weights=deviations, minlength=features.shape[1])
    variance = (squares + (n_rows - filled) * mean**2) / n_rows
    low, high = (bound.toarray().ravel() for bound in (features.min(axis=0), features.max(axis=0)))
    return np.where(low == high, low, mean), np.where(low == high, 0.0, variance)


def _end_to_end(trees: Iterable[tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """Trees of (feature, threshold, left, right, is_leaf, value), nodes counted from 0, as one array each."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("feature", "threshold", "left", "right", "value")}
    roots, start = [], 0
    for feature, threshold, left, right, leaf, value in trees:
        parts["feature"].append(np.where(leaf, 0, feature).astype(np.int64))
        parts["threshold"].append(np.where(leaf, 0.0, threshold))
        parts["left"].append(np.where(leaf, LEAF, left.astype(np.int64) + start))
        parts["right"].append(np.where(leaf, LEAF, right.astype(np.int64) + start))
        parts["value"].append(np.asarray(value, np.float64))
        roots.append(start)
        start += len(value)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()} | {"roots": np.asarray(roots)}


def _constant(n_features: int, labels: np.ndarray) -> FrozenClassifier:
    """For rows whose features are all alike: the share of label 1."""
    empty, share = np.zeros(0), labels.mean()
    columns, intercept = np.zeros(0, np.int64), np.asarray(np.log(share / (1 - share)))
    return FrozenLinear(
        n_features=n_features, columns=columns, mean=empty, scale=empty, coef=empty, intercept=intercept
    )


def _verified(frozen: FrozenClassifier, features: Features, expected: np.ndarray) -> FrozenClassifier:
    off = float(np.abs(frozen.predict_proba(features[:PROBED_ROWS]) - expected).max())
    if off > EXPORT_TOLERANCE:
        raise RuntimeError(
            f"the exported {frozen.KIND} predicts {off:.1e} off what scikit-learn fitted; this version of "
            "scikit-learn lays out its models otherwise. Install one that hf_gradtools was tested with (1.9)."
        )
    return frozen


def _sklearn(module: str) -> Any:
    """A module of scikit-learn, imported when a classifier is fitted."""
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "Fitting classifiers needs scikit-learn: pip install 'hf_gradtools[ghosttrack]'. "
            "Saved ones predict without it."
        ) from error
