"""Rank-space curvature against its definitions, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.core.curvature import (
    balanced_coordinates,
    damped,
    damped_inverse,
    effective_rank,
    eigenbasis,
    energies,
    graft,
    inverse_power,
    projectors,
    rank_for_energy,
    ranks_for_total_energy,
    truncation,
)


def factor(rank, seed=0, decay=1.0, batch=()):
    """A random positive definite matrix whose spectrum falls."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, rank, rank, generator=generator, dtype=torch.float64)
    return root @ torch.diag(torch.arange(1, rank + 1, dtype=torch.float64) ** -decay) @ root.mT


def cost(activation, gradient, projector):
    gone = torch.eye(len(projector), dtype=projector.dtype) - projector
    return 0.5 * torch.trace(gradient @ gone @ activation @ gone.mT)


def test_inverse_is_of_the_damped_factor():
    values = factor(5, batch=(3,))
    inverse, taken = damped_inverse(values, 0.1)
    torch.testing.assert_close(inverse @ damped(values, 0.1), torch.eye(5).double().expand(3, 5, 5))
    assert taken.tolist() == [0.1] * 3


def test_damping_is_relative():
    values = factor(5)
    torch.testing.assert_close(damped_inverse(1e-12 * values, 0.1)[0], damped_inverse(values, 0.1)[0])


def test_damping_rises_only_where_a_factor_is_indefinite():
    values = factor(3, batch=(2,))
    values[1] = torch.diag(torch.tensor([2.0, 1.5, -0.5]))  # mean 1: positive definite from 0.5 on
    inverse, taken = damped_inverse(values, 0.1)
    assert taken.tolist() == pytest.approx([0.1, 1.0])
    torch.testing.assert_close(inverse[1] @ damped(values[1], 1.0), torch.eye(3).double())


def test_damping_is_not_raised_for_ever():
    with pytest.raises(torch.linalg.LinAlgError, match="kfac_damping"):
        damped_inverse(torch.diag(torch.tensor([100.0, -98.0])), 1e-3)
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(torch.full((2, 2), torch.nan), 1e-3)


def test_inverse_power():
    values = factor(4)
    half = inverse_power(values, 0.1, 0.5)
    torch.testing.assert_close(half @ half, damped_inverse(values, 0.1)[0])


def test_zero_factor_has_neutral_answers():
    zero = torch.zeros(3, 3)
    torch.testing.assert_close(damped_inverse(zero, 0.5)[0], torch.eye(3).double() / 1.5)
    assert torch.equal(eigenbasis(zero)[1], torch.eye(3).double())
    assert all(x.isfinite().all() for x in balanced_coordinates(zero, factor(3)))


def test_eigenbasis_is_sorted_and_rebuilds():
    values = factor(6, batch=(2,))
    spectrum, vectors = eigenbasis(values)
    assert (spectrum.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(vectors * spectrum[:, None] @ vectors.mT, values)


def test_balanced_coordinates_diagonalise_both_factors_alike():
    activation, gradient = factor(6, 1), factor(6, 2)
    left, right, spectrum = balanced_coordinates(activation, gradient)
    diagonal = torch.diag(spectrum.sqrt())
    torch.testing.assert_close(left @ activation @ left.mT, diagonal)
    torch.testing.assert_close(right.mT @ gradient @ right, diagonal)
    torch.testing.assert_close(left @ right, torch.eye(6).double())
    torch.testing.assert_close(torch.linalg.eigvals(activation @ gradient).real.sort(descending=True)[0], spectrum)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_cost_of_a_balanced_cut_is_half_of_what_is_dropped(rank):
    activation, gradient = factor(6, 1), factor(6, 2)
    left, right = truncation("balanced", activation, gradient, rank)
    dropped = balanced_coordinates(activation, gradient)[2][rank:].sum() / 2
    torch.testing.assert_close(cost(activation, gradient, right @ left), dropped, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_cut_is_cheaper(rank):
    activation, gradient = factor(5, 3), factor(5, 4)
    best = balanced_coordinates(activation, gradient)[2][rank:].sum() / 2
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        into, out = (torch.randn(5, rank, generator=generator, dtype=torch.float64) for _ in range(2))
        oblique = into @ torch.linalg.inv(out.mT @ into) @ out.mT
        assert cost(activation, gradient, oblique) >= best * (1 - 1e-9)
    for method in ("two_sided", "one_sided"):
        left, right = truncation(method, activation, gradient, rank)
        assert cost(activation, gradient, right @ left) >= best


def test_full_rank_cut_changes_nothing():
    left, right = truncation("balanced", factor(6, 1, decay=3), factor(6, 2, decay=3), 6)
    torch.testing.assert_close(right @ left, torch.eye(6).double(), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 1000), rank=st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_balanced_spectrum_does_not_depend_on_the_gauge(seed, rank):
    activation, gradient = factor(rank, seed), factor(rank, seed + 1)
    change = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change += 3 * torch.eye(rank)
    back = torch.linalg.inv(change)
    moved = energies("balanced", change @ activation @ change.mT, back.mT @ gradient @ back)
    torch.testing.assert_close(moved, energies("balanced", activation, gradient), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ["balanced", "two_sided", "one_sided"])
def test_projectors_do_what_the_truncation_does(method):
    activation, gradient = factor(6, 1), factor(6, 2)
    left, right = truncation(method, activation, gradient, 3)
    in_place_left, in_place_right = projectors(method, activation, gradient, 3)
    torch.testing.assert_close(in_place_right @ in_place_left, right @ left)
    torch.testing.assert_close(in_place_left @ in_place_left, in_place_left)


def test_papers_projections_use_each_factors_own_eigenvectors():
    activation, gradient = factor(6, 1), factor(6, 2)
    for_a, for_b = projectors("two_sided", activation, gradient, 2)
    torch.testing.assert_close(torch.trace(for_a @ activation), eigenbasis(activation)[0][:2].sum())
    torch.testing.assert_close(torch.trace(for_b @ gradient), eigenbasis(gradient)[0][:2].sum())


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    threshold=st.floats(0.01, 1),
    least=st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_rank_is_the_least_that_holds_the_energy(values, threshold, least):
    spectrum = torch.tensor(values, dtype=torch.float64).sort(descending=True)[0]
    rank = int(rank_for_energy(spectrum, threshold, least))
    wanted = threshold * float(spectrum.sum())
    naive = next(k for k in range(1, len(values) + 1) if float(spectrum[:k].sum()) >= wanted * (1 - 1e-9))
    assert rank == min(max(naive, least), len(values)) or abs(float(spectrum[:rank].sum()) - wanted) <= 1e-9 * wanted


def test_effective_rank():
    assert float(effective_rank(torch.ones(7))) == pytest.approx(7)
    assert float(effective_rank(torch.tensor([1.0, 0, 0]))) == pytest.approx(1)


def test_graft_keeps_each_norm():
    grad, direction = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.linalg.matrix_norm(graft(direction, grad)), torch.linalg.matrix_norm(grad))


def test_basis_of_what_is_not_finite_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        eigenbasis(torch.full((2, 2), torch.nan))


def test_total_energy_is_held_for_the_fewest_parameters():
    """Against trying all rank vectors, for layers whose directions cost alike."""
    spectra = [torch.tensor([9.0, 1.0, 0.1]), torch.tensor([5.0, 4.0, 3.0]), torch.tensor([0.2, 0.1, 0.05])]
    for threshold in (0.5, 0.8, 0.95, 0.999, 1.0):
        ranks = ranks_for_total_energy(spectra, [10, 10, 10], threshold, 1)
        held = sum(float(x[:k].sum()) for x, k in zip(spectra, ranks, strict=True))
        total = sum(float(x.sum()) for x in spectra)
        assert held >= threshold * total - 1e-6
        for other in itertools.product([1, 2, 3], repeat=3):
            if sum(other) < sum(ranks):
                assert sum(float(x[:k].sum()) for x, k in zip(spectra, other, strict=True)) < threshold * total


def test_wide_layers_pay_for_their_width():
    spectra = [torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.5])]
    assert ranks_for_total_energy(spectra, [1, 100], 0.8, 1) == [2, 1]
    assert ranks_for_total_energy(spectra, [1, 100], 0.5, 2) == [2, 2]
