"""Selecting training data: the best rows over the target's tasks, joined with their dataset, spread out if asked."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_gradtools.ghost.gradproj.ensemble import GradientEnsemble
from hf_gradtools.ghost.gradproj.selection import score_rows, select
from hf_gradtools.ghost.gradproj.store import GradientStore, GradientWriter


def write(path, gradients, ids=None):
    with GradientWriter(path, {"seed": 0}, dim=gradients.shape[1], dtype="float32") as writer:
        ids = list(range(len(gradients))) if ids is None else ids
        writer.append({"sample_id": ids, "gradient": gradients})
        writer.finish()
    return GradientStore.open(path)


@pytest.fixture
def gradients():
    return torch.randn(200, 8)


@pytest.fixture
def store(tmp_path, gradients):
    return write(tmp_path / "store", gradients)


@pytest.fixture
def tasks():
    return {"a": torch.randn(5, 8), "b": torch.randn(2, 8)}


def cosines(gradients, queries):
    return torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(gradients.double()).T


def reference(gradients, tasks, reduce="mean"):
    best = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[reduce]
    return torch.stack([best(cosines(gradients, task)) for task in tasks.values()]).amax(0)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_rows_count_with_their_best_over_tasks(store, gradients, tasks, reduce):
    expected = reference(gradients, tasks, reduce)
    assert np.allclose(score_rows(store, tasks, reduce=reduce), expected, atol=1e-6)
    found = select(store, tasks, 0.1, reduce=reduce)
    assert found["row"][:] == found["sample_id"][:] == expected.topk(20).indices.tolist()
    assert np.allclose(found["score"][:], expected.topk(20).values, atol=1e-6)


@pytest.mark.parametrize(("budget", "number"), [({}, 10), ({"fraction": 1.0}, 200), ({"count": 3}, 3)])
def test_the_budget_is_a_share_or_a_number(store, tasks, budget, number):
    assert len(select(store, tasks, **budget)) == number
    assert len(select(store, tasks["a"], **budget)) == number


def test_rows_of_the_dataset_come_back_with_their_score(tmp_path, gradients, tasks):
    ids = [f"s{i}" for i in range(200)]
    store = write(tmp_path, gradients, ids)
    best = reference(gradients, tasks).topk(4).indices.tolist()
    in_order = select(store, tasks, count=4, dataset=Dataset.from_dict({"text": [f"t{i}" for i in range(200)]}))
    assert in_order["text"][:] == [f"t{row}" for row in best]
    assert in_order.column_names == ["text", "score"]
    shuffled = torch.randperm(200).tolist()
    by_id = Dataset.from_dict({"sample_id": [ids[i] for i in shuffled], "text": [f"t{i}" for i in shuffled]})
    assert select(store, tasks, count=4, dataset=by_id)["text"][:] == in_order["text"][:]


def naive_mmr(gradients, scores, count, diversity, candidates):
    pool = np.argsort(-scores, kind="stable")[: candidates * count]
    unit = torch.nn.functional.normalize(gradients.double())[pool]
    relevance = scores[pool] - scores[pool].min()
    relevance = relevance / relevance.max()
    picked = []
    while len(picked) < count:
        similarity = (unit @ unit[picked].T).amax(1).numpy() if picked else 0
        value = (1 - diversity) * relevance - diversity * similarity
        value[picked] = -np.inf
        picked.append(int(value.argmax()))
    return pool[picked].tolist()


@pytest.mark.parametrize("diversity", [0.3, 0.9, 1.0])
def test_diversity_is_maximal_marginal_relevance(store, gradients, tasks, diversity):
    found = select(store, tasks, count=12, diversity=diversity, candidates=5)
    expected = naive_mmr(gradients, score_rows(store, tasks), 12, diversity, 5)
    assert found["row"][:] == expected


def test_diversity_passes_over_copies(tmp_path):
    gradients = torch.eye(4).repeat_interleave(5, dim=0)
    target = torch.tensor([1.0, 0.9, 0.8, 0.7])
    store = write(tmp_path, gradients)
    assert select(store, target, count=4)["row"][:] == [0, 1, 2, 3]
    assert select(store, target, count=4, diversity=0.8, candidates=5)["row"][:] == [0, 5, 10, 15]


def test_an_ensemble_selects_by_its_weighted_sum(tmp_path, store, gradients):
    others = torch.randn(200, 8)
    ensemble = GradientEnsemble([store, write(tmp_path / "other", others)], [3, 1])
    queries = [torch.randn(4, 8), torch.randn(4, 8)]
    expected = (3 * cosines(gradients, queries[0]) + cosines(others, queries[1])).mean(0)
    assert select(ensemble, queries, count=5)["row"][:] == expected.topk(5).indices.tolist()
    assert len(set(select(ensemble, queries, count=5, diversity=0.5)["row"])) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0; pass a share"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"count": 201}, "count=201, but the store has 200 rows"),
        ({"count": 0}, "count=0"),
        ({"fraction": 0.1, "count": 3}, "not both"),
        ({"diversity": 1.5}, "diversity=1.5"),
        ({"candidates": 0}, "candidates=0"),
        ({"reduce": None}, "reduce=None"),
        ({"metric": "l2"}, "metric='l2'"),
        ({"dataset": Dataset.from_dict({"text": ["a"]})}, "dataset has 1 rows, the store 200"),
        ({"dataset": Dataset.from_dict({"score": [1.0] * 200})}, "column 'score' already"),
        ({"dataset": Dataset.from_dict({"sample_id": [500, 501]})}, "lacks 10 of the selected sample_ids"),
        ({"dataset": Dataset.from_dict({"sample_id": [1, 1]})}, "sample_ids more than once"),
    ],
)
def test_what_cannot_be_selected_is_refused(store, tasks, options, message):
    with pytest.raises(ValueError, match=message):
        select(store, tasks, **options)
