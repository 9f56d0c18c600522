"""Search equals a naive reference in float64, in every metric, and refuses what it cannot do."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.core.store import StoreMismatchError
from hf_gradtools.ghost.gradproj import search as search_module
from hf_gradtools.ghost.gradproj import store as store_module
from hf_gradtools.ghost.gradproj.ensemble import GradientEnsemble
from hf_gradtools.ghost.gradproj.store import GradientStore, GradientWriter
from hf_gradtools.ghost.gradproj.topk import RunningTopK


DIM = 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(search_module, "BLOCK_BYTES", 0)  # 64 rows
    monkeypatch.setattr(store_module.GradientStore.blocks, "__defaults__", (4 * DIM * 50,))


def write(path, gradients, identity=None, finish=True, extra=None, first_id=0):
    with GradientWriter(path, identity or {"seed": 0}, dim=gradients.shape[1], dtype="float32", extra=extra) as writer:
        if len(gradients):
            writer.append({"sample_id": list(range(first_id, first_id + len(gradients))), "gradient": gradients})
        if finish:
            writer.finish()
    return GradientStore.open(path)


@pytest.fixture
def gradients():
    return torch.randn(300, DIM) * torch.linspace(0.5, 2, DIM)


@pytest.fixture
def store(tmp_path, gradients):
    return write(tmp_path / "store", gradients, first_id=1000)


@pytest.fixture
def queries():
    return torch.randn(7, DIM)


def reference(gradients, queries, metric="dot", precondition=None, damping=0.1):
    """Scores [Q, N] in float64."""
    p, q = gradients.double(), queries.double()
    inverse = torch.eye(p.shape[1], dtype=torch.float64)
    if precondition == "fisher":
        fisher = p.T @ p / len(p)
        inverse = torch.linalg.inv(fisher + damping * fisher.trace() / len(fisher) * inverse)
    scores = q @ inverse @ p.T
    if metric == "cosine":
        scores /= ((q @ inverse) * q).sum(1).sqrt()[:, None] * ((p @ inverse) * p).sum(1).sqrt()
    return scores


def check(found, scores, k, names=None):
    """That the rows found are the k best of the scores [G, N]."""
    values, rows = scores.topk(k, dim=1)
    assert found["row"][:] == rows.flatten().tolist()
    assert np.allclose(found["score"][:], values.flatten(), rtol=1e-4, atol=1e-5)
    assert found["rank"][:] == list(range(1, k + 1)) * len(scores)
    names = list(range(len(scores))) if names is None else names
    assert found["query"][:] == [name for name in names for _ in range(k)]


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("precondition", [None, "fisher"])
@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_scores_equal_a_float64_reference(store, gradients, queries, metric, precondition, backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    found = store.search(queries, 9, metric, precondition, damping=0.3, backend=backend)
    check(found, reference(gradients, queries, metric, precondition, 0.3), 9)
    assert found["sample_id"][:] == [1000 + row for row in found["row"][:]]


def test_queries_may_be_arrays_lists_or_one_vector(store, gradients, queries):
    scores = reference(gradients, queries)
    check(store.search(queries.numpy(), 3), scores, 3)
    check(store.search(queries.tolist(), 3), scores, 3)
    check(store.search(queries[0], 3), scores[:1], 3)
    check(store.search(queries.half(), 300), reference(gradients, queries.half()), 300)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_groups_are_scored_by_the_mean_or_best_of_their_queries(store, gradients, queries, metric, reduce):
    scores = reference(gradients, queries, metric)
    one = getattr(torch, {"mean": "mean", "max": "amax"}[reduce])
    groups = {"math": queries[:3], "code": queries[3:]}
    expected = torch.stack([one(scores[:3], dim=0), one(scores[3:], dim=0)])
    check(store.search(groups, 5, metric, reduce=reduce), expected, 5, ["math", "code"])
    check(store.search(queries, 5, metric, reduce=reduce), one(scores, dim=0)[None], 5)


def test_a_store_of_queries_is_searched_by_its_rows(tmp_path, store, gradients, queries):
    other = write(tmp_path / "queries", queries, {"seed": 0, "dataset": "validation"})
    check(store.search(other, 4), reference(gradients, queries), 4)
    check(store.search({"all": other}, 4), reference(gradients, queries).mean(0, keepdim=True), 4, ["all"])
    strange = write(tmp_path / "strange", queries, {"seed": 1})
    with pytest.raises(
        StoreMismatchError, match=r"does not compare with the store of queries .*seed: stored 0, given 1"
    ):
        store.search(strange)


class Projector:
    """A row's gradient is in the row."""

    def adopt(self, store):
        pass

    def identity(self):
        return {"seed": 0}

    def gradients(self, rows, optimizer_aware=False):
        return torch.tensor([row["input_ids"] for row in rows]) * (2.0 if optimizer_aware else 1.0)


def as_rows(queries):
    return [{"input_ids": row} for row in queries.tolist()]


def test_rows_are_projected_by_the_bound_projector(store, gradients, queries):
    store.bind(Projector())
    scores = reference(gradients, queries)
    check(store.search(as_rows(queries), 4), scores, 4)
    check(store.search(Dataset.from_list(as_rows(queries)), 4), scores, 4)
    check(store.search({"a": as_rows(queries[:2])}, 4), scores[:2].mean(0, keepdim=True), 4, ["a"])
    check(store.search(as_rows(queries), 4, precondition="adam"), 2 * scores, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metric": "euclid"}, ValueError, "metric='euclid' is unknown. Pass one of 'dot', 'cosine'"),
        ({"precondition": "hessian"}, ValueError, "precondition='hessian' is unknown. Pass one of None, 'fisher'"),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
        ({"reduce": "sum"}, ValueError, "reduce='sum' is unknown"),
        ({"k": 301}, ValueError, "k=301, but the store has 300 rows"),
        ({"k": 0}, ValueError, "k=0"),
        ({"precondition": "fisher", "damping": -1.0}, ValueError, "damping=-1.0"),
        ({"precondition": "adam"}, ValueError, "needs their rows: bind a projector"),
        ({"queries": [{"input_ids": [1]}]}, ValueError, "has no projector.*store.bind"),
        ({"queries": {"input_ids": [1]}}, ValueError, "queries is one row; pass a list of rows"),
        ({"queries": {}}, ValueError, "empty mapping"),
        ({"queries": "text"}, ValueError, "queries is str, not gradients"),
        ({"queries": torch.ones(2, 5)}, ValueError, r"queries has shape \(2, 5\).*dim=12"),
        ({"queries": torch.ones(0, DIM)}, ValueError, "0 queries"),
        ({"queries": {"a": torch.full((2, DIM), torch.nan)}}, ValueError, r"queries\['a'\]: query 0 is not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_for_is_refused(store, queries, change, error, message):
    with pytest.raises(error, match=message):
        store.search(**{"queries": queries, **change})


def test_an_empty_store_is_refused(tmp_path, queries):
    with pytest.raises(ValueError, match="has no rows to search"):
        write(tmp_path, torch.empty(0, DIM)).search(queries)


def test_of_equal_scores_the_lower_row_comes_first(tmp_path):
    gradients = torch.ones(200, DIM)
    gradients[::3] = 2
    found = write(tmp_path, gradients).search(torch.ones(2, DIM), k=70)
    expected = [*range(0, 200, 3), 1, 2, 4]
    assert found["row"][:] == expected * 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200), k=st.integers(1, 40), block=st.integers(1, 90), levels=st.integers(1, 30),
    queries=st.integers(1, 4), ascending=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_running_top_k_equals_a_stable_sort(rows, k, block, levels, queries, ascending, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (rows, queries), generator=generator).float()
    scores = scores.sort(dim=0).values if ascending else scores
    best, k = RunningTopK(queries, min(k, rows)), min(k, rows)
    for first in range(0, rows, block):
        best.update(first, scores[first : first + block])
    query, rank, row, score = best.result()
    expected = (-scores).argsort(dim=0, stable=True)[:k].T
    assert row.reshape(queries, k).tolist() == expected.tolist()
    assert score.tolist() == scores.T.gather(1, expected).flatten().tolist()
    assert (query.tolist(), rank.tolist()) == (sorted([*range(queries)] * k), [*range(1, k + 1)] * queries)


def test_zero_gradients_have_cosine_zero(tmp_path, gradients):
    gradients[5] = 0
    found = write(tmp_path, gradients).search(torch.randn(1, DIM), 300, "cosine")
    assert dict(zip(found["row"], found["score"], strict=True))[5] == 0
    assert np.isfinite(found["score"][:]).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_fisher_matrix_without_directions_is_refused(tmp_path, value):
    store = write(tmp_path, torch.full((20, DIM), value))
    with pytest.raises(ValueError, match="all gradients of the store are zero|is singular at damping=0.0"):
        store.search(torch.ones(DIM), precondition="fisher", damping=0.0)


def fails(*_):
    raise AssertionError("the Fisher matrix was computed again")


def test_the_fisher_matrix_is_kept_until_rows_change(tmp_path, store, gradients, queries, monkeypatch):
    expected = store.search(queries, precondition="fisher")["score"][:]
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "fisher_matrix", fails)
        assert GradientStore.open(store.path).search(queries, precondition="fisher")["score"][:] == expected
    more = torch.randn(50, DIM)
    changed = write(store.path, more, first_id=1300)
    found = changed.search(queries, 5, precondition="fisher")
    check(found, reference(torch.cat([gradients, more]), queries, "dot", "fisher"), 5)


def test_a_damaged_fisher_file_is_not_used(store, queries):
    expected = store.search(queries, precondition="fisher")["score"][:]
    file = store.path / "fisher.safetensors"
    for position in (2, 60, 900):
        content = bytearray(file.read_bytes())
        content[position] ^= 0x40
        file.write_bytes(content)
        assert GradientStore.open(store.path).search(queries, precondition="fisher")["score"][:] == expected


def test_rows_in_progress_are_found_and_no_fisher_matrix_is_kept_of_them(tmp_path, gradients, queries):
    store = write(tmp_path, gradients, finish=False)
    check(store.search(queries, 5, precondition="fisher"), reference(gradients, queries, "dot", "fisher"), 5)
    assert not list(tmp_path.glob("fisher*"))


def test_faiss_is_named_with_its_extra_where_it_is_missing(store, queries, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_gradtools\[faiss\]'"):
        store.search(queries, backend="faiss")


def test_faiss_takes_the_mean_of_groups_but_not_the_best(store, gradients, queries):
    pytest.importorskip("faiss")
    found = store.search({"a": queries}, 5, "cosine", backend="faiss")
    check(found, reference(gradients, queries, "cosine").mean(0, keepdim=True), 5, ["a"])
    with pytest.raises(ValueError, match="Pass backend='exact'"):
        store.search({"a": queries}, reduce="max", backend="faiss")


# ---- several checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """Two stores of the same samples with other numbers of dimensions, and their gradients."""
    parts = [torch.randn(200, DIM), torch.randn(200, 5)]
    stores = [
        write(tmp_path / str(i), part, {"seed": 0, "weights": i}, extra={"learning_rate": 3e-4 - 2e-4 * i})
        for i, part in enumerate(parts)
    ]
    return stores, parts


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("reduce", [None, "max"])
def test_an_ensemble_scores_by_the_weighted_sum_over_checkpoints(checkpoints, metric, reduce):
    stores, parts = checkpoints
    queries = [torch.randn(6, DIM), torch.randn(6, 5)]
    by_rate = GradientEnsemble(stores)
    assert np.allclose(by_rate.weights, [0.75, 0.25])
    for ensemble, weights in ((by_rate, (0.75, 0.25)), (GradientEnsemble(stores, [2, 1]), (2, 1))):
        scores = sum(w * reference(p, q, metric) for w, p, q in zip(weights, parts, queries, strict=True))
        scores = scores.amax(dim=0, keepdim=True) if reduce else scores
        check(ensemble.search(queries, 5, metric, reduce=reduce), scores, 5)


def test_an_ensemble_takes_a_list_of_stores_or_an_ensemble_of_queries(tmp_path, checkpoints):
    stores, parts = checkpoints
    queries = [torch.randn(6, DIM), torch.randn(6, 5)]
    asked = [write(tmp_path / f"q{i}", q, {"seed": 0, "weights": i}) for i, q in enumerate(queries)]
    scores = sum(w * reference(p, q) for w, p, q in zip((0.75, 0.25), parts, queries, strict=True))
    check(GradientEnsemble(stores).search(asked, 5), scores, 5)
    check(GradientEnsemble(stores).search(GradientEnsemble(asked, [1, 1]), 5), scores, 5)
    with pytest.raises(StoreMismatchError, match="weights: stored 0, given 1"):
        GradientEnsemble(stores).search(asked[::-1])


class OfCheckpoint(Projector):
    def __init__(self, number, dim):
        self.number, self.dim = number, dim

    def identity(self):
        return {"seed": 0, "weights": self.number}

    def gradients(self, rows, optimizer_aware=False):
        return super().gradients(rows, optimizer_aware)[:, : self.dim]


def test_an_ensemble_projects_rows_at_each_checkpoint(checkpoints):
    stores, parts = checkpoints
    queries = torch.randn(4, DIM)
    with pytest.raises(ValueError, match="has no projector"):
        GradientEnsemble(stores).search(as_rows(queries))
    ensemble = GradientEnsemble([s.bind(OfCheckpoint(i, s.dim)) for i, s in enumerate(stores)])
    scores = 0.75 * reference(parts[0], queries) + 0.25 * reference(parts[1], queries[:, :5])
    check(ensemble.search(as_rows(queries), 5), scores, 5)


def test_an_impossible_ensemble_is_refused(tmp_path, checkpoints):
    stores, _ = checkpoints
    unrated = write(tmp_path / "unrated", torch.randn(200, DIM))
    shifted = write(tmp_path / "shifted", torch.randn(200, DIM), first_id=1)
    with pytest.raises(ValueError, match="stores is empty"):
        GradientEnsemble([])
    with pytest.raises(ValueError, match=r"learning rates \[0.0003, None\]; pass weights="):
        GradientEnsemble([stores[0], unrated])
    with pytest.raises(ValueError, match=r"stores\[1\] \(200 rows\) has other sample_ids"):
        GradientEnsemble([stores[0], shifted])
    with pytest.raises(ValueError, match=r"weights=\[1.0\]; pass a finite number for each of 2 stores"):
        GradientEnsemble(stores, [1])
    with pytest.raises(ValueError, match="pass a list of 2 arrays"):
        GradientEnsemble(stores).search(torch.ones(3, DIM))
