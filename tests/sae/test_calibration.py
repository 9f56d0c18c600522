from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from hf_gradtools.sae.calibration import (
    data_directions,
    encoder_scale,
    geometric_median,
    scale_below_thresholds,
    unit_scale,
)


def sum_of_distances(point, x):
    return float(np.linalg.norm(x - point, axis=1).sum())


@pytest.mark.parametrize(("num_tokens", "width"), [(50, 3), (7, 2), (200, 8)])
def test_the_median_has_the_least_sum_of_distances(num_tokens, width):
    x = np.random.default_rng(num_tokens).normal(size=(num_tokens, width)) * 4 + 10
    found = minimize(sum_of_distances, x.mean(0), args=(x,), method="Nelder-Mead",
                     options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 40_000, "maxfev": 40_000})  # fmt: skip
    ours = geometric_median(torch.tensor(x), max_iterations=1000, tolerance=1e-10)
    assert sum_of_distances(ours.double().numpy(), x) <= found.fun * (1 + 1e-8)
    assert sum_of_distances(geometric_median(torch.tensor(x)).double().numpy(), x) <= found.fun * (1 + 1e-5)


def test_few_outliers_move_the_mean_but_not_the_median():
    x = torch.randn(100, 4)
    x[:5] = 1e4
    assert x.mean(0).norm() > 100
    assert geometric_median(x).norm() < 1


def test_a_median_that_is_one_of_the_points():
    """Weiszfeld's weights are infinite there; the best of the points is found by trying all of them."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    best = min(points, key=lambda point: sum_of_distances(point.numpy(), points.numpy()))
    torch.testing.assert_close(geometric_median(points), best, atol=1e-5, rtol=0)


def test_one_point_given_many_times_is_the_median():
    assert torch.equal(geometric_median(torch.full((9, 3), 2.5)), torch.full((3,), 2.5))


def test_the_median_of_bfloat16_is_float32():
    x = torch.randn(64, 4).bfloat16()
    assert geometric_median(x).dtype == torch.float32
    torch.testing.assert_close(geometric_median(x), geometric_median(x.float()))


def test_scaled_activations_have_a_mean_square_of_one():
    x = torch.randn(100, 4) * 7 + 30
    center = geometric_median(x)
    assert float((unit_scale(x, center) * (x - center)).square().mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_constant_or_not_finite_activations_are_named(value):
    x = torch.full((10, 4), value)
    with pytest.raises(ValueError, match=r"mean square (0\.0|nan|inf).*constant, or not finite"):
        unit_scale(x, torch.full((4,), 3.0))


def test_directions_point_from_the_center_to_different_tokens():
    x, center = torch.randn(50, 6) + 3, torch.full((6,), 3.0)
    x[7] = center
    directions = data_directions(x, center, 50, seed=1)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(50))
    cosines = torch.nn.functional.normalize(x - center, dim=1) @ directions.T
    fits = cosines > 1 - 1e-5
    assert fits.sum(1).tolist() == [int(token != 7) for token in range(50)]
    assert torch.equal(directions, data_directions(x, center, 50, seed=1))
    assert not torch.equal(directions, data_directions(x, center, 50, seed=2))


def test_directions_beyond_the_tokens_are_random():
    x = torch.randn(5, 8)
    directions = data_directions(x, torch.zeros(8), 40, seed=0)
    fits = torch.nn.functional.normalize(x, dim=1) @ directions.T > 1 - 1e-5
    assert fits.sum() == 5
    assert torch.linalg.matrix_rank(directions) == 8


@pytest.mark.parametrize(("factor", "expected"), [(4.0, 0.25), (-1.0, 1.0), (0.0, 1.0)])
def test_the_encoder_is_scaled_to_the_nearest_reconstruction(factor, expected):
    x = torch.randn(20, 4)
    assert encoder_scale(x, factor * x) == pytest.approx(expected)


def test_the_scale_below_thresholds_balances_what_falls_below():
    """At scale s a reconstruction is 8·s·x, of tokens whose length s brings above 0.5: as long as x at s = 0.125."""
    x = torch.nn.functional.normalize(torch.randn(30, 4), dim=1) * torch.linspace(1, 6, 30)[:, None]
    lengths = x.norm(dim=1, keepdim=True)
    scale = scale_below_thresholds(x, lambda s: torch.where(s * lengths > 0.5, 8 * s * x, 0.0))
    assert scale == pytest.approx(0.125, rel=0.01)
