"""Bases, sketches and rank rules; the rules' projections against `torch.func` per-sample gradients in float64."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_gradtools.core.capture import LayerCapture, find_layers
from hf_gradtools.core.projection import (
    BASES,
    Block,
    Projection,
    Sketch,
    energy_ranks,
    principal_basis,
    project_matrix,
    random_basis,
    split_rank,
    square_ranks,
)
from hf_gradtools.core.samples import SampleLayout
from tests.core.test_layers import MODULES


# ---- bases and sketches


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("sketched", [False, True])
def test_inner_products_are_kept_in_expectation(kind, sketched):
    """Over 400 seeds the mean estimate is within four standard errors of the truth, for three blocks at once."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (9, 12), "b": (20, 6), "c": (7, 1)}
    x, y = ({n: torch.randn(1, *s, generator=generator) for n, s in shapes.items()} for _ in range(2))
    y = {n: y[n] + 0.5 * x[n] for n in shapes}
    blocks = [Block(n, s, (min(3, s[0]), min(4, s[1]))) for n, s in shapes.items()]
    estimates = []
    for seed in range(400):
        bases = {
            b.name: tuple(
                random_basis(d, k, kind, seed, b.name, side)
                for d, k, side in zip(b.shape, b.ranks, ("out", "in"), strict=True)
            )
            for b in blocks
        }
        projection = Projection(blocks, bases, 16 if sketched else None, seed)
        rows = torch.zeros(2, projection.dim)
        for i, grads in enumerate((x, y)):
            for name, grad in grads.items():
                projection.add(rows[i : i + 1], name, project_matrix(grad, bases[name]))
        estimates.append(float(rows[0] @ rows[1]))
    exact = sum(float((x[n] * y[n]).sum()) for n in shapes)
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / math.sqrt(len(estimates))
    assert np.std(estimates) > 0


def test_orthonormal_bases_have_least_variance():
    x = torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(0))

    def spread(kind):
        norms = []
        for seed in range(200):
            bases = (random_basis(40, 10, kind, seed, "out"), random_basis(30, 10, kind, seed, "in"))
            norms.append(float(project_matrix(x, bases).square().sum()))
        return np.var(norms)

    assert spread("orthonormal") < 0.8 * min(spread("gaussian"), spread("rademacher"))


@pytest.mark.parametrize("kind", BASES)
def test_a_basis_is_decided_by_seed_and_name(kind):
    basis = random_basis(30, 4, kind, 7, "layer.weight", "in")
    assert basis.shape == (30, 4)
    assert torch.equal(basis, random_basis(30, 4, kind, 7, "layer.weight", "in"))
    for other in [(8, "layer.weight", "in"), (7, "layer.weight", "out"), (7, "layer2.weight", "in")]:
        assert not torch.equal(basis, random_basis(30, 4, kind, *other))
    assert random_basis(30, 30, kind, 7, "x") is None


def test_another_process_draws_the_same_to_the_bit():
    code = (
        "import hashlib, torch; from hf_gradtools.core.projection import random_basis, Sketch\n"
        "h = hashlib.sha256()\n"
        "for kind in ('orthonormal', 'gaussian', 'rademacher'): h.update(random_basis(50, 8, kind, 3, 'n').numpy())\n"
        "h.update(Sketch(100, 16, 3, 'n')(torch.eye(100)).numpy()); print(h.hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256()
    for kind in ("orthonormal", "gaussian", "rademacher"):
        digest.update(random_basis(50, 8, kind, 3, "n").numpy())
    digest.update(Sketch(100, 16, 3, "n")(torch.eye(100)).numpy())
    assert there == digest.hexdigest()


def test_the_streams_do_not_change_between_versions():
    """Stores hold seeds, not bases: these numbers must never change."""
    signs = random_basis(6, 2, "rademacher", 0, "layer", "in") > 0
    assert signs.flatten().tolist() == GOLDEN_SIGNS
    np.testing.assert_allclose(random_basis(3, 1, "gaussian", 0, "layer", "in").flatten(), GOLDEN_NORMALS, atol=1e-6)
    assert Sketch(4, 3, 0, "layer")(torch.arange(1.0, 5)[None]).flatten().tolist() == GOLDEN_SKETCH


GOLDEN_SIGNS = [True, False, True, False, True, False, False, False, False, True, True, False]
GOLDEN_NORMALS = [1.1908892393112183, 0.5401344895362854, -0.8838487267494202]
GOLDEN_SKETCH = [5.0, 1.0, -4.0]


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_sketch_deals_numbers_out_evenly(size, dim, seed):
    matrix = Sketch(size, dim, seed, "x")(torch.eye(size))
    assert (matrix.abs().sum(1) == 1).all()  # every number goes to one slot, with a sign
    slots = matrix.abs().sum(0)
    assert slots.max() - slots.min() <= 1


def test_principal_basis_spans_the_main_directions():
    torch.manual_seed(0)
    tokens = torch.randn(300, 50) @ torch.diag(0.8 ** torch.arange(50.0)) @ torch.linalg.qr(torch.randn(50, 50)).Q
    basis = principal_basis(tokens, 8, 0, "x")
    exact = torch.linalg.svd(tokens.double(), full_matrices=False).Vh[:8].T
    kept = (tokens.double() @ basis.double()).square().sum() / (tokens.double() @ exact).square().sum()
    assert kept > 1 - 1e-6
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)


# ---- ranks


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12), st.integers(0, 3000))
@settings(deadline=None)
def test_split_ranks_never_exceed_the_total_nor_the_sides(shapes, more):
    total = len(shapes) + more
    ranks = split_rank(shapes, total)
    assert sum(a * b for a, b in ranks) <= total
    assert all(1 <= a <= o and 1 <= b <= i for (a, b), (o, i) in zip(ranks, shapes, strict=True))
    if total >= 2 * sum(o * i for o, i in shapes):
        assert ranks == shapes


def test_what_small_parameters_leave_goes_to_large_ones():
    assert split_rank([(4, 1), (100, 100)], 404) == [(4, 1), (20, 20)]
    with pytest.raises(ValueError, match="proj_rank_total=2 is less than one number for each of 3"):
        split_rank([(4, 4)] * 3, 2)


def test_square_ranks_use_a_long_side_when_the_other_is_short():
    assert square_ranks((2, 100), 64) == (2, 32)
    assert square_ranks((100, 2), 64) == (32, 2)
    assert square_ranks((1000, 1000), 64) == (8, 8)


def test_energy_ranks_grow_with_the_power_two_thirds_within_the_budget():
    shapes, energies = [(2000, 2000)] * 4, [1.0, 8.0, 64.0, 0.0]
    ranks = energy_ranks(shapes, energies, 3 * 64**2)
    assert sum(a * b for a, b in ranks) <= 3 * 64**2
    assert ranks[3] == (8, 8)
    assert ranks[1][0] / ranks[0][0] == pytest.approx(4, rel=0.35)
    assert ranks[2][0] / ranks[1][0] == pytest.approx(4, rel=0.1)
    assert energy_ranks([(5, 7), (300, 20)], [1.0, 1.0], 10**6) == [(5, 7), (300, 20)]


# ---- the rules' projections


class Watcher:
    """Projects every call that it sees, with the same bases for all uses of a parameter."""

    def __init__(self, rows, bases, factors=None):
        self.layout, self.bases, self.factors, self.found = SampleLayout(rows, (7,)), bases, factors, {}
        self.replaying = False

    def rows(self):
        return None if self.replaying else self.layout.rows

    def seen(self, layer):
        pass

    def wants_takeover(self, layer, activations):
        return False

    def observe(self, layer, call):
        bases = {name: self.bases[p] for name, p in layer.parameters.items()}
        factors = None if self.factors is None else {n: self.factors[p] for n, p in layer.parameters.items()}
        self.replaying = True
        for name, value in layer.rule.project(layer, call, self.layout, bases, factors).items():
            p = layer.parameters[name]
            self.found[p] = value + self.found.get(p, 0)
        self.replaying = False


@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_projected_gradients_of(kind, frozen, with_factors):
    torch.manual_seed(0)
    make, features = MODULES[kind]
    model = make().double()
    x = torch.randn(4, 7, *features, dtype=torch.float64)
    weights = torch.randn(4, *model(x).shape[1:], dtype=torch.float64)
    layers = find_layers(model)
    shapes = {p: x.rule.as_matrix(n, p.detach()).shape for x in layers for n, p in x.parameters.items()}
    bases = {
        p: (random_basis(o, 3, "orthonormal", 0, "o", str(o)), random_basis(i, 2, "gaussian", 0, "i", str(i)))
        for p, (o, i) in shapes.items()
    }
    factors = {p: torch.rand_like(p) for p in shapes} if with_factors else None
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    watcher = Watcher(4, bases, factors)
    capture = LayerCapture(layers, watcher, frozen=True)
    if frozen:
        model.requires_grad_(False)
    capture.attach()
    (model(x) * weights).sum().backward()
    capture.detach()

    def loss(parameters, sample, weight):
        return (torch.func.functional_call(model, parameters, (sample[None],)) * weight).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, weights)
    rules = {p: (x.rule, n) for x in layers for n, p in x.parameters.items()}
    for name, p in model.named_parameters():
        rule, local = rules[p]
        grad = grads[name] if factors is None else grads[name] * factors[p]
        expected = torch.stack([project_matrix(rule.as_matrix(local, g), bases[p]) for g in grad])
        torch.testing.assert_close(watcher.found[p], expected, rtol=1e-8, atol=1e-10)
        assert frozen == (p.grad is None)


@pytest.mark.parametrize("vocabulary", [3, 40])
def test_an_embedding_with_shared_positions_and_a_padding_index(vocabulary):
    torch.manual_seed(0)
    embedding = nn.Embedding(vocabulary, 6, padding_idx=0).double()
    (layer,) = find_layers(embedding)
    ids = torch.randint(0, vocabulary, (4, 7))
    weights = torch.randn(4, 7, 6, dtype=torch.float64)
    p = embedding.weight
    bases = {p: (random_basis(vocabulary, 5, "rademacher", 0, "o"), random_basis(6, 2, "orthonormal", 0, "i"))}
    watcher = Watcher(4, bases)
    capture = LayerCapture([layer], watcher)
    capture.attach()
    (embedding(ids) * weights).sum().backward()
    capture.detach()
    for n in range(4):
        (grad,) = torch.autograd.grad((embedding(ids[n : n + 1]) * weights[n]).sum(), p)
        torch.testing.assert_close(watcher.found[p][n], project_matrix(grad, bases[p]), rtol=1e-8, atol=1e-10)


def test_packed_samples_are_told_apart():
    layout = SampleLayout(2, (5,), torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]]), 4)
    left, right = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    found = layout.outer_sums(left, right)
    for n in range(4):
        mask = layout.segments == n
        torch.testing.assert_close(found[n], left[mask].T @ right[mask])
