"""Counts and statistics of features that fire together, against dense loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.ghosttrack.tracking.coactivation import (
    STATISTICS,
    CoactivationCounts,
    CoactivationSimilarity,
)


def csr(fires):
    tokens, features = np.nonzero(fires)
    return features, np.concatenate([[0], np.cumsum(np.bincount(tokens, minlength=len(fires)))])


def counted(left, right, chunks=1):
    counts = CoactivationCounts(left.shape[1], right.shape[1])
    for rows in np.array_split(np.arange(len(left)), chunks):
        counts.add(csr(left[rows]), csr(right[rows]))
    return counts


def expected(x, y, kind):
    """The statistic of two columns of flags, from its textbook form."""
    n, a, b, c = len(x), x.sum(), y.sum(), (x & y).sum()
    if c == 0:
        return 0.0
    if kind == "cosine":
        return np.dot(x.astype(float), y.astype(float)) / (np.linalg.norm(x) * np.linalg.norm(y))
    if kind == "correlation":
        return max(np.corrcoef(x, y)[0, 1], 0.0) if 0 < a < n and 0 < b < n else 0.0
    return 1.0 if c == n else max(math.log((c / n) / (a / n * b / n)) / -math.log(c / n), 0.0)


@pytest.mark.parametrize("kind", list(STATISTICS))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.2, 0.6, 1.0]), chunks=st.integers(1, 3))
def test_statistics_equal_loops_over_columns_in_any_chunks(kind, seed, density, chunks):
    rng = np.random.default_rng(seed)
    left, right = rng.random((12, 4)) < density, rng.random((12, 5)) < density
    found = counted(left, right, chunks).statistic(kind).toarray()
    for i, j in np.ndindex(4, 5):
        assert found[i, j] == pytest.approx(expected(left[:, i], right[:, j], kind), abs=1e-6)
    assert 0 <= found.min() <= found.max() <= 1 + 1e-6


def test_rare_pairs_are_left_out():
    left = np.array([[1, 1], [1, 0], [0, 0]], bool)
    statistic = counted(left, left).statistic("cosine", min_count=2)
    assert statistic.toarray().tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert statistic.nnz == 1


@pytest.mark.parametrize("lookups", [0, 10**6])
def test_pairs_are_looked_up_with_and_without_a_table(lookups):
    rng = np.random.default_rng(0)
    statistic = counted(rng.random((20, 6)) < 0.3, rng.random((20, 7)) < 0.3).statistic()
    dense = statistic.toarray()
    assert 0 < statistic.nnz < dense.size
    rows, columns = rng.integers(0, 6, (8, 4)), rng.integers(0, 7, (8, 5))
    found = CoactivationSimilarity([statistic]).between(0, lookups)(rows, columns)
    assert np.array_equal(found, dense[rows[:, :, None], columns[:, None, :]])


def test_nothing_ever_fired_together():
    statistic = counted(np.array([[1, 0]], bool), np.array([[0, 0]], bool)).statistic()
    assert CoactivationSimilarity([statistic]).between(0, 0)(np.array([[0]]), np.array([[1]])).tolist() == [[[0.0]]]


def test_bad_counts_are_named():
    counts = CoactivationCounts(2, 2)
    with pytest.raises(ValueError, match="left has 1 tokens and right 2"):
        counts.add(([0], [0, 1]), ([0, 1], [0, 1, 2]))
    with pytest.raises(ValueError, match="right has feature 2"):
        counts.add(([0], [0, 1]), ([2], [0, 1]))
    with pytest.raises(ValueError, match="kind='l2'"):
        counts.statistic("l2")
