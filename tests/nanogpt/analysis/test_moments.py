import math

import numpy as np
import pytest
import scipy.stats
import torch

from hf_gradtools.nanogpt.analysis import moments
from hf_gradtools.nanogpt.analysis.moments import Moments


def check(found, values):
    values = np.asarray(values, dtype=np.float64)
    assert found.count == values.size
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.stdev == pytest.approx(values.std(), rel=1e-9)
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(values), rel=1e-6, abs=1e-9)
    assert found.abs_max == np.abs(values).max()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_stream_of_unequal_parts_equals_the_whole(offset):
    values = np.random.default_rng(0).gamma(0.7, size=5000) - offset  # skewed, so that third moments matter
    found = Moments()
    for part in np.split(values, [1, 4, 1700, 1700, 4999]):
        found.update(torch.from_numpy(part))
    check(found, values)


def test_large_tensors_go_through_in_chunks(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK", 7)
    values = torch.randn(5, 20, 3) ** 3
    check(Moments.of(values), values.flatten().numpy())


def test_half_precision_is_summed_in_double():
    values = torch.full((100_000,), 0.1, dtype=torch.bfloat16)
    values[0] = 100
    check(Moments.of(values), values.double().numpy())


def test_streams_join():
    values = torch.randn(300).exp()
    left, right = Moments.of(values[:100]), Moments.of(values[100:])
    left.merge(right)
    check(left, values)
    left.merge(Moments())
    check(left, values)


def test_no_spread_has_no_kurtosis():
    assert math.isnan(Moments.of(torch.ones(5)).kurtosis)
    assert Moments.of(torch.ones(5)).stdev == 0
    assert math.isnan(Moments().stdev)


@pytest.mark.parametrize("place", [0, 3])
def test_a_nan_is_not_hidden(place):
    values = torch.ones(4)
    values[place] = math.nan
    found = Moments.of(values[:2])
    found.update(values[2:])
    assert math.isnan(found.abs_max)
    assert math.isnan(found.mean)
