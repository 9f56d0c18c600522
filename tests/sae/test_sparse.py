"""The sparse arithmetic against the dense one, in float64."""

from __future__ import annotations

import pytest
import torch

from hf_gradtools.sae import sparse
from hf_gradtools.sae.sparse import SparsePattern, decode, linear_at


N, D, F = 7, 5, 11


def patterns():
    torch.manual_seed(0)
    mask = torch.rand(N, F) < 0.3
    mask[2] = False  # a token without features
    mask[:, 4] = False  # a feature without tokens
    return {
        "ragged": SparsePattern.of_mask(mask),
        "rows": SparsePattern.of_rows(torch.rand(N, F).topk(3).indices, F),
        "empty": SparsePattern.of_mask(torch.zeros(N, F, dtype=torch.bool)),
        "full": SparsePattern.of_mask(torch.ones(N, F, dtype=torch.bool)),
    }


@pytest.fixture(params=["gathered", "dense"])
def way(request, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 2.0 if request.param == "gathered" else -1.0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", patterns())
def test_decode_and_its_gradients_are_those_of_the_dense_product(name, way):
    pattern, values, weight, probe = patterns()[name], None, random(F, D), random(N, D).detach()
    values = random(pattern.indices.numel())
    ours = decode(values, weight, pattern)
    dense = torch.zeros(N, F, dtype=torch.float64).index_put((pattern.rows, pattern.indices), values) @ weight
    torch.testing.assert_close(ours, dense)
    for mine, reference in zip(
        torch.autograd.grad((ours * probe).sum(), (values, weight)),
        torch.autograd.grad((dense * probe).sum(), (values, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", patterns())
def test_a_linear_map_at_pairs_has_the_gradients_of_the_whole(name, known, way):
    pattern = patterns()[name]
    x, weight, bias = random(N, D), random(F, D), random(F)
    probe = torch.randn(pattern.indices.numel(), dtype=torch.float64)
    dense = (x @ weight.T + bias)[pattern.rows, pattern.indices]
    ours = linear_at(x, weight, bias, pattern, dense.detach() if known else None)
    torch.testing.assert_close(ours, dense)
    for mine, reference in zip(
        torch.autograd.grad((ours * probe).sum(), (x, weight, bias)),
        torch.autograd.grad((dense * probe).sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


def test_pairs_gathered_by_feature():
    pattern = patterns()["ragged"]
    order, rows, begins = pattern.by_feature
    ends = [*begins[1:].tolist(), len(rows)]
    for feature, (begin, end) in enumerate(zip(begins.tolist(), ends, strict=True)):
        assert rows[begin:end].tolist() == pattern.rows[pattern.indices == feature].tolist()
        assert (pattern.indices[order[begin:end]] == feature).all()


def test_selected_pairs_keep_their_tokens():
    pattern = patterns()["ragged"]
    chosen = pattern.indices % 2 == 0
    part = pattern.select(chosen)
    assert part.rows.tolist() == pattern.rows[chosen].tolist()
    assert part.indices.tolist() == pattern.indices[chosen].tolist()
    assert part.num_tokens == N
