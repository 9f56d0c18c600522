"""A fair test of hallucination detectors: grouped folds, everything fitted inside them, the same folds for all.

Shape letters: T rows (texts), P features.

Rows of one question never stand on both sides of a split, neither between training and test nor in the inner
cross-validation that chooses among feature matrices (layers), options (C) and thresholds. Only pairs of rows of one
fold are compared in AUROC, see [`auroc`].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_gradtools.ghosttrack.classifiers.frozen import Features, FrozenClassifier, check_features
from hf_gradtools.ghosttrack.classifiers.recipes import Classifier, make_classifier
from hf_gradtools.ghosttrack.evaluation.folds import grouped_folds
from hf_gradtools.ghosttrack.evaluation.results import CrossValidation
from hf_gradtools.ghosttrack.evaluation.statistics import auroc, best_threshold
from hf_gradtools.ghosttrack.labels import check_labels


__all__ = ["FittedMethod", "Method", "cross_validate", "fit_method"]

logger = logging.getLogger(__name__)

ONLY = "features"  # name of the feature matrix of a method that has one


@dataclass(frozen=True, eq=False)
class Method:
    """One way to score texts.

    Args:
        name (`str`): in tables.
        features: `[T, P]`, dense or scipy sparse; or a mapping of such (one per layer, say), of which the inner
            cross-validation chooses one; or, with `classifier=None`, a score per text `[T]`.
        classifier (`str` or [`Classifier`], *optional*): a name for [`make_classifier`] or its result. `None`: the
            score needs no fit; which end means hallucinated is decided on the training rows.
        options (`Mapping`): for [`make_classifier`].
    """

    name: str
    features: Features | Mapping[str, Features]
    classifier: str | Classifier | None = "logistic_regression"
    options: Mapping[str, Any] = field(default_factory=dict)

    def matrices(self, n_rows: int) -> dict[str, Features]:
        """The feature matrices by name, checked to have `n_rows` rows; a plain score is a matrix of one column."""
        given = self.features if isinstance(self.features, Mapping) else {ONLY: self.features}
        if not given:
            raise ValueError(f"method {self.name!r} has no features. Pass a matrix [T, P].")
        matrices = {}
        for key, features in given.items():
            label = f"features of {self.name!r}" if key == ONLY else f"features[{key!r}] of {self.name!r}"
            if self.classifier is None and np.ndim(features) == 1:
                features = np.asarray(features)[:, None]
            matrices[key] = check_features(features, 1 if self.classifier is None else None, label)
            if matrices[key].shape[0] != n_rows:
                raise ValueError(f"{label} has {matrices[key].shape[0]} rows; labels has {n_rows}. Pass one per text.")
        return matrices

    def recipe(self, seed: int) -> Classifier | None:
        """What to fit, if anything."""
        if self.classifier is None or isinstance(self.classifier, Classifier):
            return self.classifier
        return make_classifier(self.classifier, **{"seed": seed, **self.options})


@dataclass(frozen=True, eq=False)
class FittedMethod:
    """A method fitted on all rows given, its open choices made by inner grouped cross-validation.

    Attributes:
        model ([`FrozenClassifier`] or `int`): what scores rows; for a plain score its sign, 1 or -1.
        matrix (`str`): which feature matrix it takes, `"features"` if there was but one.
        threshold (`float`): scores from here on are called hallucinated.
        recipe ([`Classifier`], *optional*): what was fitted, with the options chosen.
        inner_auroc (`float`): of the choice, out of the inner folds.
    """

    model: FrozenClassifier | int
    matrix: str
    threshold: float
    recipe: Classifier | None
    inner_auroc: float

    def scores(self, features: Features) -> np.ndarray:
        """`[T]`, the higher, the likelier hallucinated, for rows of the matrix that `self.matrix` names."""
        return _scores(self.model, features)


def fit_method(
    method: Method,
    labels: Any,
    groups: Any,
    *,
    inner_folds: int = 3,
    objective: str = "youden",
    seed: int = 0,
) -> FittedMethod:
    """Fits a method as [`cross_validate`] does within each fold; also how a final detector is made.

    Args:
        method ([`Method`]): its features have a row per label.
        labels, groups (`[T]`): 0 or 1; question ids.
        inner_folds (`int`, defaults to 3): grouped folds in which feature matrix, options and threshold are chosen.
        objective (`str`, defaults to `"youden"`): what the threshold maximises; see [`best_threshold`].
        seed (`int`, defaults to 0): of folds and classifiers.
    """
    labels = check_labels(labels)
    return _fit(method.matrices(len(labels)), method.recipe(seed), labels, groups, inner_folds, objective, seed)


def cross_validate(
    methods: Sequence[Method],
    labels: Any,
    groups: Any,
    *,
    categories: Any = None,
    n_folds: int = 5,
    inner_folds: int = 3,
    baseline: str | None = None,
    objective: str = "youden",
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CrossValidation:
    """Scores every row by models that saw no row of its group, for each method on the same folds.

    Args:
        methods (`Sequence[Method]`): what to compare.
        labels (`[T]`): 1 = hallucinated, 0 = true.
        groups (`[T]`): question ids; rows of one never part.
        categories (`[T]`, *optional*): for tables per category.
        n_folds (`int`, defaults to 5), inner_folds (`int`, defaults to 3): outer folds, and folds within their
            training rows, in which feature matrix, options and threshold are chosen.
        baseline (`str`, *optional*): name of the method with which the others are compared, pair by pair.
        objective (`str`, defaults to `"youden"`): what thresholds maximise; see [`best_threshold`].
        resamples (`int`, defaults to 2000), confidence (`float`, defaults to 0.95): of the bootstrap over groups.
        seed (`int`, defaults to 0): of folds, classifiers and resamples.

    Returns:
        [`CrossValidation`]

    Raises:
        ValueError: labels of one kind, too few groups, rows that do not match, features that are not finite, or
            unknown names.
    """
    labels, groups = check_labels(labels), np.asarray(groups)
    if categories is not None and np.shape(categories) != labels.shape:
        raise ValueError(f"categories has shape {np.shape(categories)}; need one per label, ({len(labels)},).")
    names = [method.name for method in methods]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"methods are named {names}; need one or more, each with its own name.")
    if baseline is not None and baseline not in names:
        raise ValueError(f"baseline={baseline!r} is no method. Pass one of {', '.join(names)}.")
    folds = grouped_folds(labels, groups, n_folds, seed)
    matrices = {method.name: method.matrices(len(labels)) for method in methods}
    scores, predicted, choices = {}, {}, {}
    for method in methods:
        scores[method.name], predicted[method.name] = np.empty(len(labels)), np.empty(len(labels), np.int64)
        choices[method.name] = []
        for fold in range(n_folds):
            test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            rows = {key: features[train] for key, features in matrices[method.name].items()}
            fitted = _fit(rows, method.recipe(seed), labels[train], groups[train], inner_folds, objective, seed)
            scores[method.name][test] = fitted.scores(matrices[method.name][fitted.matrix][test])
            predicted[method.name][test] = scores[method.name][test] >= fitted.threshold
            choices[method.name].append(_as_choice(fitted))
            logger.info("%s, fold %d of %d: inner AUROC %.3f", method.name, fold + 1, n_folds, fitted.inner_auroc)
    return CrossValidation(
        labels=labels,
        groups=groups,
        folds=folds,
        categories=None if categories is None else np.asarray(categories),
        scores=scores,
        predicted=predicted,
        choices=choices,
        baseline=baseline,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def _fit(
    matrices: dict[str, Features],
    recipe: Classifier | None,
    labels: np.ndarray,
    groups: Any,
    inner_folds: int,
    objective: str,
    seed: int,
) -> FittedMethod:
    folds = grouped_folds(labels, groups, inner_folds, seed + 1)
    tuned = [None] if recipe is None else recipe.tuned_by().candidates()
    inner = {
        (key, index): _out_of_fold(candidate, features, labels, folds)
        for key, features in matrices.items()
        for index, candidate in enumerate(tuned)
    }
    merits = {place: auroc(labels, scores, folds) for place, scores in inner.items()}
    key, index = max(merits, key=merits.__getitem__)  # of equals the first
    features, scores = matrices[key], inner[key, index]
    if recipe is not None and recipe.tuned_by() is not recipe:
        recipe = recipe.decided(tuned[index])
        scores = _out_of_fold(recipe, features, labels, folds)
    elif recipe is not None:
        recipe = recipe.decided(tuned[index])
    model = _fit_one(recipe, features, labels)
    if recipe is None:
        scores = _scores(model, features)
    return FittedMethod(model, key, best_threshold(labels, scores, objective), recipe, auroc(labels, scores, folds))


def _out_of_fold(recipe: Classifier | None, features: Features, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    scores = np.empty(len(labels))
    for fold in range(folds.max() + 1):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        scores[test] = _scores(_fit_one(recipe, features[train], labels[train]), features[test])
    return scores


def _fit_one(recipe: Classifier | None, features: Features, labels: np.ndarray) -> FrozenClassifier | int:
    if recipe is not None:
        return recipe.fit(features, labels)
    return 1 if auroc(labels, _column(features)) >= 0.5 else -1


def _scores(model: FrozenClassifier | int, features: Features) -> np.ndarray:
    return model * _column(features) if isinstance(model, int) else model.scores(features)


def _column(features: Features) -> np.ndarray:
    return features[:, 0] if isinstance(features, np.ndarray) else features.toarray()[:, 0]


def _as_choice(fitted: FittedMethod) -> dict[str, Any]:
    choice: dict[str, Any] = {"threshold": fitted.threshold, "inner_auroc": fitted.inner_auroc}
    if fitted.matrix != ONLY:
        choice["features"] = fitted.matrix
    if fitted.recipe is None:
        return choice | {"sign": fitted.model}
    return choice | {"classifier": type(fitted.recipe).__name__, "options": dict(vars(fitted.recipe))}
