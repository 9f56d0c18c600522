"""The harness cannot leak, its statistics are what their definitions say, and mistakes are named."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn import metrics

from hf_gradtools.ghosttrack.classifiers.recipes import make_classifier
from hf_gradtools.ghosttrack.evaluation.cross_validation import Method, cross_validate, fit_method
from hf_gradtools.ghosttrack.evaluation.folds import grouped_folds
from hf_gradtools.ghosttrack.evaluation.statistics import (
    auroc,
    best_threshold,
    bootstrap_auroc,
    paired_difference,
    threshold_metrics,
)


QUICK = {
    "random_forest": {"n_estimators": 15},
    "gradient_boosting": {"max_iter": 15},
    "logistic_regression": {"C": (0.01, 1.0)},
    "ensemble": {"C": (0.1,)},
}


def quick(name, features, label=None):
    return Method(label or name, features, name, QUICK[name])


def scored(methods, labels, groups, **options):
    """AUROC of each method."""
    result = cross_validate(methods, labels, groups, resamples=1, **{"n_folds": 4, "inner_folds": 2, **options})
    return {row.method: row.auroc.estimate for row in result.table}


def question_identity(seed, n_groups=500, size=2):
    """Rows of one question share label and features, and the features say nothing but which question it is."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), size)
    labels = (rng.random(n_groups) < 0.4).astype(int)[groups]
    return rng.normal(size=(n_groups, 5))[groups], labels, groups


# --- the harness cannot leak -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["logistic_regression", "gradient_boosting", "random_forest"])
def test_question_identity_scores_at_chance_and_naive_folds_would_not_notice(name, seed):
    vectors, labels, groups = question_identity(seed)
    assert 0.4 <= scored([quick(name, vectors)], labels, groups)[name] <= 0.6
    if name == "random_forest":
        naive = scored([quick(name, vectors)], labels, np.arange(len(labels)))  # every row a group of its own
        assert naive[name] > 0.9


def test_one_hot_questions_score_at_chance():
    _, labels, groups = question_identity(0, n_groups=100, size=3)
    one_hot = sp.csr_matrix(np.eye(100)[groups])
    methods = [Method(name, one_hot, name, QUICK[name]) for name in QUICK if name != "ensemble"]
    assert scored(methods, labels, groups) == dict.fromkeys([method.name for method in methods], 0.5)
    naive = scored([quick("logistic_regression", one_hot)], labels, np.arange(len(labels)))
    assert naive["logistic_regression"] > 0.9


@pytest.mark.parametrize("name", list(QUICK))
def test_true_and_false_answers_with_their_questions_features_score_at_chance(name):
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(150), 2), np.tile([0, 1], 150)
    features = rng.normal(size=(150, 4))[groups]
    assert scored([quick(name, features)], labels, groups, n_folds=2)[name] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(6))
def test_base_rates_of_folds_do_not_push_below_chance(seed):
    """Few large groups: folds cannot have equal label shares, and a base rate alone is anti-correlated."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 12, 400)
    labels = (rng.random(400) < rng.random(12)[groups]).astype(int)
    result = cross_validate(
        [Method("constant", np.ones((400, 1)), options={"C": 1.0})], labels, groups, n_folds=6, resamples=1
    )
    assert metrics.roc_auc_score(labels, result.scores["constant"]) < 0.47  # what pooling would report
    assert result.table[0].auroc.estimate == 0.5


@pytest.mark.parametrize("name", list(QUICK))
def test_a_planted_signal_is_found(name):
    vectors, labels, groups = question_identity(3, n_groups=80)
    vectors[:, 2] += 4 * labels
    assert scored([quick(name, vectors)], labels, groups, n_folds=2)[name] > 0.9


def test_selection_is_inside_the_folds():
    """Columns selected on all rows would find noise that fits the test rows as well."""
    rng = np.random.default_rng(0)
    features, labels, groups = rng.normal(size=(160, 4000)), rng.integers(0, 2, 160), np.arange(160) // 2
    outside = features[:, np.argsort(-np.abs((labels - 0.5) @ features))[:10]]
    methods = [
        Method("inside", features, "logistic_regression", {"C": 1.0, "select": 10}),
        Method("outside", outside, "logistic_regression", {"C": 1.0}),
    ]
    found = scored(methods, labels, groups)
    assert 0.35 < found["inside"] < 0.65
    assert found["outside"] > 0.85


def test_the_layer_is_chosen_on_training_folds():
    vectors, labels, groups = question_identity(5, n_groups=100)
    layers = {"layers.0": vectors, "layers.1": vectors + labels[:, None], "layers.2": vectors[:, :2]}
    result = cross_validate([Method("probe", layers, options={"C": 1.0})], labels, groups, n_folds=3, resamples=1)
    assert [choice["features"] for choice in result.choices["probe"]] == ["layers.1"] * 3
    rng = np.random.default_rng(0)
    noise = {f"layers.{index}": rng.normal(size=(len(labels), 3)) for index in range(12)}
    assert 0.4 <= scored([Method("noise", noise, options={"C": 1.0})], labels, groups)["noise"] <= 0.6


def test_a_plain_score_is_oriented_without_the_test_rows():
    _, labels, groups = question_identity(0, n_groups=60)
    length = np.random.default_rng(0).normal(size=len(labels)) - 2 * labels
    result = cross_validate([Method("length", length, None)], labels, groups, resamples=1)
    assert result.table[0].auroc.estimate == auroc(labels, -length, result.folds) > 0.85
    first = result.folds == 0
    tampered = np.where(first, -length, length)  # what the test rows look like must not change the sign
    again = cross_validate([Method("length", tampered, None)], labels, groups, resamples=1)
    assert auroc(labels[first], again.scores["length"][first]) < 0.2


@pytest.mark.parametrize("n_folds", [2, 5])
def test_folds_keep_groups_whole_and_label_shares_alike(n_folds):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 90, 600).astype(str)
    labels = (rng.random(600) < 0.25).astype(int)
    folds = grouped_folds(labels, groups, n_folds, seed=1)
    assert all(len(np.unique(folds[groups == group])) == 1 for group in np.unique(groups))
    shares = [labels[folds == fold].mean() for fold in range(n_folds)]
    sizes = np.bincount(folds)
    assert max(shares) - min(shares) < 0.02
    assert sizes.max() - sizes.min() <= 12
    assert (folds == grouped_folds(labels, groups, n_folds, seed=1)).all()
    assert (folds != grouped_folds(labels, groups, n_folds, seed=2)).any()


# --- results -----------------------------------------------------------------------------------------------------


def small_result(**options):
    vectors, labels, groups = question_identity(1, n_groups=40)
    categories = np.where(groups < 20, "history", "maths")
    signal = np.random.default_rng(2).normal(size=len(labels)) + labels
    methods = [Method("signal", signal, None), Method("chance", vectors, options={"C": 1.0})]
    return cross_validate(
        methods, labels, groups, categories=categories, n_folds=3, baseline="chance", resamples=200, **options
    )


def test_tables_are_the_metrics_of_the_scores(tmp_path):
    result = small_result()
    row = result.table[0]
    assert row.auroc.low < row.auroc.estimate == auroc(result.labels, result.scores["signal"], result.folds)
    assert row.f1 == pytest.approx(metrics.f1_score(result.labels, result.predicted["signal"]))
    assert [(row.category, row.method) for row in result.category_table][:3] == [
        ("history", "signal"),
        ("history", "chance"),
        ("maths", "signal"),
    ]
    history = result.categories == "history"
    assert result.category_table[0].accuracy == np.mean((result.labels == result.predicted["signal"])[history])
    difference = result.differences("chance")["signal"]
    assert difference.estimate == pytest.approx(row.auroc.estimate - result.table[1].auroc.estimate)
    rows = result.to_dataset()
    assert rows["signal"][:] == result.scores["signal"].tolist()
    assert set(rows.column_names) >= {"label", "group", "fold", "category", "chance", "chance_predicted"}
    result.save(tmp_path / "deep" / "result.json")
    saved = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert saved["table"][0]["auroc"]["estimate"] == row.auroc.estimate
    assert saved["rows"]["signal"] == result.scores["signal"].tolist()
    assert saved["choices"]["chance"][0]["options"]["C"] == 1.0
    markdown = result.to_markdown()
    assert f"| signal | 80 | {row.auroc.estimate:.3f} |" in markdown
    assert "| AUROC − chance | 95 % CI |" in markdown
    assert (result.scores["chance"] == small_result().scores["chance"]).all()


def test_a_category_of_one_label_has_no_auroc(tmp_path):
    _, labels, groups = question_identity(1, n_groups=40)
    score = np.arange(80.0)
    result = cross_validate([Method("score", score, None)], labels, groups, categories=labels, n_folds=3, resamples=20)
    assert "one label only" in result.to_markdown()
    result.save(tmp_path / "result.json")
    assert "NaN" not in (tmp_path / "result.json").read_text()


def test_fit_method_chooses_and_its_model_scores():
    vectors, labels, groups = question_identity(2, n_groups=60)
    features = vectors + 2 * labels[:, None]
    fitted = fit_method(Method("vote", features, "ensemble", {"C": (1e-4, 1.0)}), labels, groups, inner_folds=2)
    assert fitted.recipe.C in (1e-4, 1.0)
    assert fitted.inner_auroc > 0.9
    assert threshold_metrics(labels, fitted.scores(features) >= fitted.threshold)["accuracy"] > 0.9


# --- statistics --------------------------------------------------------------------------------------------------


def pairs_auroc(labels, scores, strata):
    won = [
        (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
        for i in np.flatnonzero(labels)
        for j in np.flatnonzero(labels == 0)
        if strata[i] == strata[j]
    ]
    return np.mean(won)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_share_of_pairs(seed):
    rng = np.random.default_rng(seed)
    labels, scores, strata = rng.integers(0, 2, 60), rng.integers(0, 6, 60) / 2, rng.integers(0, 3, 60)
    assert auroc(labels, scores, strata) == pytest.approx(pairs_auroc(labels, scores, strata), abs=1e-12)
    assert auroc(labels, scores) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_threshold_metrics_are_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, 2, 50), rng.integers(0, 2, 50) * (seed > 0)
    ours = threshold_metrics(labels, predicted)
    for name in ("precision", "recall", "f1"):
        reference = getattr(metrics, f"{name}_score")(labels, predicted, zero_division=0)
        assert ours[name] == pytest.approx(reference, abs=1e-12)
    assert ours["accuracy"] == metrics.accuracy_score(labels, predicted)


@pytest.mark.parametrize(
    ("objective", "quality"),
    [
        ("accuracy", metrics.accuracy_score),
        ("f1", metrics.f1_score),
        ("youden", metrics.balanced_accuracy_score),
    ],
)
def test_best_threshold_is_the_best_of_all(objective, quality):
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 40), rng.integers(0, 12, 40).astype(float)
    found = quality(labels, scores >= best_threshold(labels, scores, objective))
    assert found == pytest.approx(max(quality(labels, scores >= t) for t in np.arange(-0.5, 12.5)), abs=1e-12)


def test_bootstrap_is_a_plain_loop_over_groups():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 20, 90)
    labels, scores, other = rng.integers(0, 2, 90), rng.normal(size=90), rng.normal(size=90)
    n_groups = len(np.unique(groups))
    drawn = np.random.default_rng(7).integers(n_groups, size=(300, n_groups))
    rows = [np.concatenate([np.flatnonzero(groups == np.unique(groups)[g]) for g in draw]) for draw in drawn]
    draws = np.array([metrics.roc_auc_score(labels[r], scores[r]) for r in rows])
    interval = bootstrap_auroc(labels, scores, groups, resamples=300, seed=7)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-12)
    differences = draws - [metrics.roc_auc_score(labels[r], other[r]) for r in rows]
    found = paired_difference(labels, scores, other, groups, resamples=300, seed=7)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=1e-12)
    assert found.share_below_zero == np.mean(differences < 0)


def test_intervals_cover_and_groups_matter():
    """Eight copies of a row are one observation: intervals by group cover the truth, intervals by row do not."""
    truth, covered, by_row = 0.760250, 0, 0  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for seed in range(120):
        rng = np.random.default_rng(seed)
        labels = np.repeat(rng.permutation(np.arange(60) % 2), 8)
        scores = np.repeat(rng.normal(size=60), 8) + labels
        group = bootstrap_auroc(labels, scores, np.arange(480) // 8, resamples=200, seed=seed)
        row = bootstrap_auroc(labels, scores, np.arange(480), resamples=200, seed=seed)
        covered += group.low <= truth <= group.high
        by_row += row.low <= truth <= row.high
    assert 0.88 <= covered / 120 <= 1.0
    assert by_row / 120 < 0.7


def test_two_thousand_resamples_of_three_thousand_rows_are_quick():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 3000), rng.normal(size=3000)
    began = time.process_time()
    paired_difference(labels, scores, rng.normal(size=3000), np.arange(3000) // 2, strata=np.arange(3000) % 5)
    assert time.process_time() - began < 5


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(40, int)}, "labels has 40 rows of label 0 and 0 of label 1"),
        ({"labels": np.full(40, 2)}, "need one 0 \\(true\\) or 1"),
        ({"groups": np.arange(40) // 20}, "n_folds=5 needs at least 5 groups with each label; 2 of 2"),
        ({"groups": np.arange(39)}, "groups has 39 rows; labels has 40"),
        ({"features": np.ones((39, 2))}, "features of 'm' has 39 rows; labels has 40"),
        ({"features": np.r_[np.ones((39, 2)), [[0, np.nan]]]}, "features of 'm' has NaN or infinity in row 39"),
        ({"features": sp.csr_matrix(np.diag([*np.ones(39), np.inf]))}, "NaN or infinity in row 39"),
        ({"features": np.ones(40)}, r"features of 'm' has shape \[40\]; need \[T, P\]"),
        ({"features": {}}, "method 'm' has no features"),
        ({"classifier": "svm"}, "classifier='svm' is unknown. Pass one of random_forest"),
        ({"options": {"depth": 2}}, "logistic_regression has no option 'depth'"),
        ({"baseline": "n"}, "baseline='n' is no method. Pass one of m"),
        ({"categories": ["a"]}, r"categories has shape \(1,\)"),
        ({"objective": "best"}, "objective='best' is unknown"),
        ({"n_folds": 1}, "n_folds=1 must be at least 2"),
    ],
)
def test_bad_input_is_named(change, message):
    rng = np.random.default_rng(0)
    given = {"labels": np.arange(40) % 2, "groups": np.arange(40) // 2, "features": rng.normal(size=(40, 2))} | change
    method = Method(
        "m", given.pop("features"), given.pop("classifier", "logistic_regression"), given.pop("options", {})
    )
    with pytest.raises(ValueError, match=message):
        cross_validate([method], given.pop("labels"), given.pop("groups"), resamples=10, **given)


def test_statistics_name_bad_input():
    with pytest.raises(ValueError, match="scores is NaN in row 1"):
        auroc([0, 1], [0.0, np.nan])
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap_auroc([0, 1], [0.0, 1.0], [0, 1], confidence=95)
    with pytest.raises(ValueError, match="methods are named"):
        cross_validate([Method("a", [1.0, 2.0], None)] * 2, [0, 1], [0, 1])
    with pytest.raises(ValueError, match="select=0"):
        make_classifier("random_forest", select=0)
