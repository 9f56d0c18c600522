"""Exported classifiers predict as scikit-learn's, survive the disk, and files that are not theirs are refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import load, load_file, save
from sklearn import decomposition, ensemble, feature_selection, linear_model, preprocessing

from hf_gradtools.ghosttrack.classifiers.classifier_files import (
    CLASSIFIER_ARRAYS,
    CLASSIFIER_JSON,
    load_classifier,
    save_classifier,
)
from hf_gradtools.ghosttrack.classifiers.frozen import FrozenEnsemble, FrozenLinear, FrozenTrees
from hf_gradtools.ghosttrack.classifiers.recipes import make_classifier, univariate_scores


QUICK = {
    "random_forest": {"n_estimators": 12},
    "gradient_boosting": {"max_iter": 12},
    "logistic_regression": {"C": 0.1},
    "ensemble": {"C": 0.1},
}


def rows(seed=0, n=120, p=9):
    rng = np.random.default_rng(seed)
    features = rng.normal(3, 2, size=(n, p)) * (rng.random((n, p)) < 0.6)
    features[:, 4] = 7.0  # a constant column
    labels = (features[:, 0] + features[:, 1] ** 2 / 4 + rng.normal(size=n) > 3).astype(int)
    return features, labels


def reference(name, features, labels):
    """scikit-learn's own, fitted by hand."""
    if name == "random_forest":
        model = ensemble.RandomForestClassifier(12, min_samples_leaf=2, random_state=3)
    elif name == "gradient_boosting":
        model = ensemble.HistGradientBoostingClassifier(max_iter=12, max_depth=3, early_stopping=False, random_state=3)
    else:
        model = linear_model.LogisticRegression(C=0.1, max_iter=2000)
    return model.fit(features, labels)


@pytest.mark.parametrize("name", ["random_forest", "gradient_boosting", "logistic_regression"])
def test_predictions_are_scikit_learns(name, tmp_path):
    features, labels = rows()
    new, _ = rows(seed=1, n=70)
    frozen = make_classifier(name, seed=3, **QUICK[name]).fit(features, labels)
    varying = np.delete(np.arange(9), 4)
    scaler = preprocessing.StandardScaler().fit(features[:, varying])
    scaled = scaler.transform if name == "logistic_regression" else np.asarray
    model = reference(name, scaled(features[:, varying]), labels)
    expected = model.predict_proba(scaled(new[:, varying]))
    assert np.abs(frozen.predict_proba(new) - expected).max() < 1e-12
    assert np.abs(frozen.predict_proba(sp.csr_matrix(new)) - expected).max() < 1e-12
    save_classifier(frozen, tmp_path)
    assert (load_classifier(tmp_path).predict_proba(new) == frozen.predict_proba(new)).all()


def test_thresholds_that_rows_lie_on():
    """Rounded features equal thresholds often; forests compare in float32."""
    rng = np.random.default_rng(0)
    features, labels = rng.integers(0, 8, (200, 4)) / 10, rng.integers(0, 2, 200)
    for name in ("random_forest", "gradient_boosting"):
        frozen = make_classifier(name, seed=3, **QUICK[name]).fit(features, labels)
        model = reference(name, features, labels)
        grid = np.concatenate([features, features + 0.05, features + 1e-9])
        assert np.abs(frozen.predict_proba(grid) - model.predict_proba(grid)).max() < 1e-12


def test_ensemble_is_the_mean_of_the_three(tmp_path):
    features, labels = rows()
    frozen = make_classifier("ensemble", seed=3, C=0.1).fit(features, labels)
    members = [
        make_classifier(name, seed=3, **({"C": 0.1} if "log" in name else {})).fit(features, labels).scores(features)
        for name in ("random_forest", "gradient_boosting", "logistic_regression")
    ]
    assert np.abs(frozen.scores(features) - np.mean(members, axis=0)).max() < 1e-12
    save_classifier(frozen, tmp_path)
    assert (load_classifier(tmp_path).scores(features) == frozen.scores(features)).all()


@pytest.mark.parametrize("scaling", ["std", "max", "none"])
def test_sparse_logistic_regression_is_the_dense_one(scaling):
    features, labels = rows()
    sparse = make_classifier("logistic_regression", C=0.1, scaling=scaling).fit(sp.csr_matrix(features), labels)
    dense = make_classifier("logistic_regression", C=0.1, scaling=scaling).fit(features, labels)
    assert np.abs(sparse.scores(features) - dense.scores(features)).max() < 1e-3  # both to L-BFGS' tolerance
    assert not sparse.mean.any()


def test_principal_components_fold_into_the_coefficients():
    features, labels = rows()
    frozen = make_classifier("logistic_regression", C=0.1, pca=3).fit(features, labels)
    scaled = preprocessing.StandardScaler().fit_transform(features)
    reduced = decomposition.PCA(3).fit_transform(scaled)
    model = linear_model.LogisticRegression(C=0.1).fit(reduced, labels)
    assert np.abs(frozen.scores(features) - model.predict_proba(reduced)[:, 1]).max() < 1e-4
    with pytest.raises(ValueError, match="pca=3 needs dense features"):
        make_classifier("logistic_regression", pca=3).fit(sp.csr_matrix(features), labels)


@pytest.mark.parametrize("wrap", [np.asarray, sp.csr_matrix])
def test_selection_takes_the_largest_f_values(wrap):
    features, labels = rows(p=30)
    merit = univariate_scores(wrap(features), labels)
    varying = np.delete(np.arange(30), 4)
    f_values = feature_selection.f_classif(features[:, varying], labels)[0]
    n = len(labels)
    assert merit[4] == -1
    assert merit[varying] ** 2 * (n - 2) / n == pytest.approx(f_values, rel=1e-9)
    frozen = make_classifier("logistic_regression", C=0.1, select=5).fit(wrap(features), labels)
    assert frozen.columns.tolist() == sorted(varying[np.argsort(-f_values)[:5]])


def test_wide_sparse_features_stay_sparse_and_give_trees_their_best_columns():
    rng = np.random.default_rng(0)
    features = sp.random(200, 20_000, density=0.01, format="lil", random_state=0)
    labels = rng.integers(0, 2, 200)
    features[labels == 1, 77] = 5.0
    features = features.tocsr()
    for name in QUICK:
        frozen = make_classifier(name, **QUICK[name]).fit(features, labels)
        assert ((frozen.scores(features) > 0.5) == labels).mean() > 0.95
    assert len(make_classifier("random_forest", n_estimators=2).fit(features, labels).columns) == 512


@pytest.mark.parametrize("name", list(QUICK))
def test_features_that_never_vary_give_the_base_rate(name, tmp_path):
    labels = np.array([0, 0, 0, 1])
    frozen = make_classifier(name).fit(np.full((4, 3), 0.1), labels)
    save_classifier(frozen, tmp_path)
    assert load_classifier(tmp_path).scores(np.ones((2, 3))) == pytest.approx(0.25)


def test_bad_rows_are_named():
    features, labels = rows()
    frozen = make_classifier("logistic_regression", C=1.0).fit(features, labels)
    with pytest.raises(ValueError, match=r"features has shape \[120, 8\]; need \[T, 9\]"):
        frozen.predict_proba(features[:, :8])
    with pytest.raises(ValueError, match="NaN or infinity in row 2"):
        frozen.predict_proba(np.where(np.arange(120)[:, None] == 2, np.nan, features))
    with pytest.raises(ValueError, match="labels has 9 rows, features 120"):
        make_classifier("random_forest").fit(features, labels[:9])
    with pytest.raises(ValueError, match="120 rows of label 0 and 0 of label 1"):
        make_classifier("random_forest").fit(features, np.zeros(120, int))
    for options in ({"C": 0}, {"C": ()}, {"scaling": "log"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            make_classifier("logistic_regression", **options)


def test_without_scikit_learn_fitting_names_the_extra_and_saved_ones_predict(tmp_path):
    features, labels = rows()
    save_classifier(make_classifier("ensemble", C=0.1).fit(features, labels), tmp_path)
    np.save(tmp_path / "rows.npy", features)
    script = (
        "import sys, numpy as np\n"
        "sys.modules['sklearn'] = sys.modules['scipy'] = None\n"
        "from hf_gradtools.ghosttrack.classifiers.classifier_files import load_classifier\n"
        "from hf_gradtools.ghosttrack.classifiers.recipes import make_classifier\n"
        "rows = np.load(sys.argv[1] + '/rows.npy')\n"
        "print(load_classifier(sys.argv[1]).scores(rows).shape)\n"
        "try: make_classifier('random_forest').fit(rows, np.arange(len(rows)) % 2)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "(120,)" in done.stdout
    assert "pip install 'hf_gradtools[ghosttrack]'" in done.stdout


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    features, labels = rows()
    recipes = {"trees": ("random_forest", {"n_estimators": 3}), "linear": ("logistic_regression", {"C": 0.1})}
    for kind, (name, options) in recipes.items():
        save_classifier(make_classifier(name, **options).fit(features, labels), folder / kind)
    frozen = [load_classifier(folder / kind) for kind in recipes]
    metadata = {"feature_names": ["a"] * 9, "threshold": 0.4}
    save_classifier(FrozenEnsemble(n_features=9, members=frozen, metadata=metadata), folder / "ensemble")
    return folder


def test_metadata_and_kinds_come_back(saved):
    loaded = load_classifier(saved / "ensemble")
    assert [type(member) for member in loaded.members] == [FrozenTrees, FrozenLinear]
    assert loaded.metadata["threshold"] == 0.4
    assert {path.name for path in (saved / "trees").iterdir()} == {CLASSIFIER_JSON, CLASSIFIER_ARRAYS}


def altered(source, target, change):
    """A copy whose arrays and description `change` has edited, with a checksum that fits."""
    shutil.copytree(source, target)
    arrays = load((target / CLASSIFIER_ARRAYS).read_bytes())
    description = json.loads((target / CLASSIFIER_JSON).read_text())
    change(arrays, description)
    content = save(arrays)
    (target / CLASSIFIER_ARRAYS).write_bytes(content)
    description["sha256"] = hashlib.sha256(content).hexdigest()
    (target / CLASSIFIER_JSON).write_text(json.dumps(description))
    return target


def put(name, index, value):
    def change(arrays, description):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("linear", lambda a, d: a.pop("coef"), "array 'coef' is missing"),
        ("linear", lambda a, d: a.update(more=np.zeros(1)), "extra array 'more'"),
        ("linear", lambda a, d: a.update(coef=np.zeros(3)), r"array 'coef' is float64 \[3\], not float64 \[8\]"),
        ("linear", lambda a, d: a.update(coef=np.zeros(8, np.float32)), "array 'coef' is float32"),
        (
            "linear",
            lambda a, d: a.update(intercept=np.zeros(1)),
            r"array 'intercept' is float64 \[1\], not float64 \[\]",
        ),
        ("linear", put("mean", 0, np.nan), "array 'mean' has NaN"),
        ("linear", put("scale", 0, 0.0), "array 'scale' has values that are not positive"),
        ("linear", put("columns", 0, 9), "array 'columns' names columns outside of the 9 features"),
        ("linear", lambda a, d: d.update(kind="os.system"), "'os.system' is unknown or missing"),
        ("linear", lambda a, d: d.update(n_features="9"), "n_features='9'"),
        ("linear", lambda a, d: d.update(version=2), "not of format"),
        ("trees", put("left", 0, 0), "array 'left' has children that are not later nodes"),
        ("trees", put("right", 0, 10**6), "array 'right' has children that are not later nodes"),
        ("trees", put("roots", 0, -1), "array 'roots'"),
        ("trees", put("feature", 0, 8), "array 'feature' names columns"),
        ("trees", lambda a, d: a.update(value=a["value"] + 2), "leaves that are no probabilities"),
        ("trees", lambda a, d: d.update(boosted=1), "boosted=1 is neither"),
        ("ensemble", lambda a, d: d.update(members=[]), "the ensemble has no members"),
        ("ensemble", lambda a, d: d["members"].pop(), "extra array 'members.1.coef'"),
        ("ensemble", lambda a, d: a.pop("members.1.coef"), "array 'members.1.coef' is missing"),
        ("ensemble", lambda a, d: d["members"].append({**d, "members": []}), "an ensemble is a member of an ensemble"),
        ("ensemble", lambda a, d: d["members"][0].update(n_features=20), "other numbers of features"),
    ],
)
def test_files_that_are_not_whole_are_refused(saved, tmp_path, kind, change, message):
    load_classifier(altered(saved / kind, tmp_path / "same", lambda a, d: None))
    with pytest.raises(ValueError, match=message):
        load_classifier(altered(saved / kind, tmp_path / "other", change))


def test_a_flipped_byte_and_half_a_replacement_are_noticed(saved, tmp_path):
    folder = shutil.copytree(saved / "linear", tmp_path / "flipped")
    content = bytearray((folder / CLASSIFIER_ARRAYS).read_bytes())
    content[-3] ^= 1
    (folder / CLASSIFIER_ARRAYS).write_bytes(content)
    with pytest.raises(ValueError, match="its sha256 differs"):
        load_classifier(folder)
    shutil.copy(saved / "trees" / CLASSIFIER_ARRAYS, folder)
    with pytest.raises(ValueError, match="half replaced"):
        load_classifier(folder)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("ending", [".pkl", ".joblib", ".skops", ".bin"])
def test_a_pickle_is_refused_and_not_run(saved, tmp_path, ending):
    proof, payload = tmp_path / "ran", pickle.dumps(Malicious(tmp_path / "ran"))
    folder = tmp_path / "detector"
    folder.mkdir()
    (folder / f"classifier{ending}").write_bytes(payload)
    with pytest.raises(ValueError, match=f"has no classifier.json; classifier{ending} in its place may run code"):
        load_classifier(folder)
    with pytest.raises(ValueError, match="may run code when it is loaded, so it is not opened"):
        load_classifier(folder / f"classifier{ending}")
    (folder / CLASSIFIER_JSON).write_bytes(payload)
    (folder / CLASSIFIER_ARRAYS).write_bytes(payload)
    with pytest.raises(ValueError, match="is no JSON"):
        load_classifier(folder)
    description = {"format": "hf_gradtools.classifier", "version": 1, "sha256": hashlib.sha256(payload).hexdigest()}
    (folder / CLASSIFIER_JSON).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_classifier(folder)
    assert not proof.exists()
    pickle.loads(payload).close()
    assert proof.exists()  # it would have run


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere has no classifier.json"):
        load_classifier(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_classifier(saved, tmp_path, monkeypatch):
    folder = shutil.copytree(saved / "linear", tmp_path / "kept")
    before = load_file(folder / CLASSIFIER_ARRAYS)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_classifier(load_classifier(saved / "trees"), folder)
    assert load_file(folder / CLASSIFIER_ARRAYS).keys() == before.keys()
    assert isinstance(load_classifier(folder), FrozenLinear)
    assert len(list(folder.iterdir())) == 2
