"""Costs by hand, cosines against loops, and the map that Procrustes finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gradtools.ghosttrack.tracking.similarity import (
    DecoderSimilarity,
    activation_change,
    association_cost,
    pairwise_cosine,
    polar_factor,
    position_distance,
    procrustes,
    worth_a_table,
)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def cosine(u, v):
    return sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def test_activation_change_by_hand():
    change = activation_change(np.array([[4.0, 0.0]]), np.array([[1.0, 4.0, 0.0]]))
    assert change.tolist() == [[[0.75, 0.0, 1.0], [1.0, 1.0, 0.0]]]


def test_position_distance_by_hand_and_in_a_text_of_one_token():
    distance = position_distance(np.array([[0, 4], [0, 0]]), np.array([[1], [0]]), np.array([5, 1]))
    assert distance.tolist() == [[[0.25], [0.75]], [[0.0], [0.0]]]


@given(st.floats(0, 100), st.floats(0, 100), st.integers(1, 50), st.data())
def test_change_and_distance_are_in_the_unit_interval(a, b, length, data):
    p, q = (data.draw(st.integers(0, length - 1)) for _ in range(2))
    assert 0 <= activation_change(np.array([a]), np.array([b])).item() <= 1
    assert 0 <= position_distance(np.array([[p]]), np.array([[q]]), np.array([length])).item() <= 1


def test_the_cost_is_the_seed_s():
    assert association_cost(0.5, 0.25, 1.0) == pytest.approx(0.6 * 0.5 + 0.2 * 0.25 + 0.2)
    assert association_cost(-1.0, 0.0, 0.0) == pytest.approx(1.2)
    assert association_cost(0.5, 0.25, 1.0, (1.0, 0.0, 2.0)) == pytest.approx(2.5)


def test_pairwise_cosines_equal_a_loop():
    left, right = random(2, 3, 5), random(2, 4, 5, seed=1)
    found = pairwise_cosine(left, right)
    for t, i, j in np.ndindex(2, 3, 4):
        assert found[t, i, j] == pytest.approx(cosine(left[t, i], right[t, j]))
    assert not pairwise_cosine(np.zeros((1, 5)), right).any()


@pytest.mark.parametrize("lookups", [0, 10**6])
@pytest.mark.parametrize("mapped", [False, True])
def test_decoders_are_compared_the_same_with_and_without_a_table(lookups, mapped):
    left, right, map_ = random(6, 4), random(7, 3 if mapped else 4, seed=1), random(4, 3, seed=2)
    similarity = DecoderSimilarity([left, right], [map_] if mapped else None)
    rows, columns = np.array([[0, 5], [2, 2]]), np.array([[6, 1, 1], [0, 3, 4]])
    found = similarity.between(0, lookups)(rows, columns)
    assert worth_a_table(6, 7, lookups) == bool(lookups)
    for t, i, j in np.ndindex(2, 2, 3):
        transported = left[rows[t, i]] @ map_ if mapped else left[rows[t, i]]
        assert found[t, i, j] == pytest.approx(cosine(transported, right[columns[t, j]]), abs=1e-6)


def test_a_table_that_does_not_fit_is_not_made():
    assert not worth_a_table(40_000, 40_000, 10**12)


# ---- Procrustes


def test_procrustes_recovers_a_rotation_and_a_shift():
    rotation = np.linalg.qr(random(5, 5))[0]
    states = random(50, 5, seed=1)
    assert np.allclose(procrustes(states, states @ rotation + 3.0), rotation)
    assert not np.allclose(procrustes(states, states @ rotation + 3.0, center=False), rotation, atol=1e-3)


@pytest.mark.parametrize(("d_left", "d_right"), [(4, 4), (3, 5), (5, 3)])
def test_no_other_orthogonal_map_is_nearer(d_left, d_right):
    left, right = random(30, d_left), random(30, d_right, seed=1)
    found = procrustes(left, right, center=False)
    side = found @ found.T if d_left <= d_right else found.T @ found
    assert np.allclose(side, np.eye(len(side)))

    def trace(map_):  # what an orthogonal map of full rank has to make large
        return np.sum((left @ map_) * right)

    others = (polar_factor(found + 0.3 * random(d_left, d_right, seed=seed)) for seed in range(200))
    assert all(trace(other) < trace(found) for other in others)


# ---- bad input


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"decoders\[1\] has shape \(3,\)"):
        DecoderSimilarity([random(4, 3), random(3)])
    with pytest.raises(ValueError, match="widths 3 and 2, and there are no maps"):
        DecoderSimilarity([random(4, 3), random(4, 2)])
    with pytest.raises(ValueError, match=r"maps\[0\] has shape \(3, 3\)"):
        DecoderSimilarity([random(4, 3), random(4, 2)], [np.eye(3)])
    with pytest.raises(ValueError, match="maps has 0 entries for 2 decoders"):
        DecoderSimilarity([random(4, 3), random(4, 3)], [])
    with pytest.raises(ValueError, match="no pairs of rows"):
        procrustes(random(4, 3), random(5, 3))
    with pytest.raises(ValueError, match="NaN"):
        procrustes(np.full((4, 3), np.nan), random(4, 3))
