"""Massive activations, left out of training and of its figures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.held_out import PartOfSource
from hf_gradtools.sae.learner import Learner
from hf_gradtools.sae.metrics import evaluate_store
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.outliers import Inliers, within
from hf_gradtools.sae.trainer import SAETrainer
from hf_gradtools.sae.training_config import SAETrainingConfig
from tests.sae.sources import TensorSource, correlated


D_IN = 8
MASSIVE = 5e4


def with_outliers(count, every=50, first=0):
    x = correlated(count, D_IN)
    x[first::every, 2] = MASSIVE
    return x


def learner_of(x, **options):
    args = SAETrainingConfig("unused", batch_tokens=64, **options)
    learner = Learner(SAEConfig(D_IN, 24, k=4), args, 10, torch.device("cpu"))
    learner.calibrate(x)
    return learner


def test_the_center_takes_the_place_of_what_is_too_far():
    x, center = torch.tensor([[3.0, 4.0], [0.0, 5.1], [torch.inf, 0.0], [torch.nan, 0.0]]), torch.zeros(2)
    kept = within(x, center, 5.0)
    torch.testing.assert_close(kept, torch.stack([x[0], center, x[2], x[3]]), equal_nan=True)
    torch.testing.assert_close(within(x, center, math.inf), x, equal_nan=True)


def test_each_hookpoint_loses_its_own_outliers():
    a, b = with_outliers(200), with_outliers(200, first=10, every=100)
    source = TensorSource({"a": a, "b": b, "c": a}, piece=7)
    bounds = {name: (x.median(0).values, 1000.0) for name, x in (("b", b), ("a", a))}
    inliers = Inliers(PartOfSource(source, 20, 200), bounds)
    chunks = list(inliers.chunks())
    assert (inliers.hookpoints, inliers.num_tokens, inliers.d_in("a")) == (["b", "a"], 180, D_IN)
    assert source.hookpoints == ["a", "b", "c"]
    for name, x in (("a", a[20:]), ("b", b[20:])):
        torch.testing.assert_close(torch.cat([chunk[name] for chunk in chunks]), x[x[:, 2] < MASSIVE])


def test_outliers_move_neither_scale_nor_directions_nor_a_step():
    clean, dirty = correlated(500, D_IN), with_outliers(500)
    ours, expected = learner_of(dirty), learner_of(clean)
    assert ours.scale == pytest.approx(expected.scale, rel=0.05)
    assert ours.radius == pytest.approx(expected.radius, rel=0.05)
    assert learner_of(dirty, outlier_ratio=None).scale < expected.scale / 10
    directions = (dirty - ours.median)[::50] @ ours.sae.W_dec.detach().T / MASSIVE
    assert float(directions.abs().max()) < 1 - 1e-3
    assert float(ours.take_step(dirty[:64]).fvu) < 1
    without = torch.where(dirty[:64, 2:3] == MASSIVE, expected.median, dirty[:64])
    one, other = learner_of(clean), learner_of(clean)
    torch.testing.assert_close(one.take_step(dirty[:64]).loss, other.take_step(without).loss)


def test_states_that_are_mostly_equal_have_no_outliers():
    x = torch.zeros(200, D_IN)
    x[::5] = torch.randn(40, D_IN)
    learner = learner_of(x)
    assert learner.radius == math.inf
    assert bool(learner.take_step(x[:64]).loss.isfinite())


def test_radius_median_and_weights_come_back(tmp_path):
    learner = learner_of(with_outliers(500))
    learner.take_step(with_outliers(64))
    learner.save(tmp_path / "state.safetensors", {})
    other = Learner(learner.sae.config, learner.args, 10, torch.device("cpu"))
    other.load(tmp_path / "state.safetensors", {})
    assert (other.radius, other.scale) == (learner.radius, learner.scale)
    assert torch.equal(other.median, learner.median)
    assert 0 < other.radius < MASSIVE
    assert torch.equal(other.take_step(with_outliers(64)).loss, learner.take_step(with_outliers(64)).loss)


def test_the_figures_kept_are_of_the_rest_alone(tmp_path):
    args = SAETrainingConfig(str(tmp_path), batch_tokens=64, calibration_tokens=320, use_cpu=True)
    held_out = TensorSource({"layers.0": with_outliers(100)}, piece=1)
    config = SAEConfig(D_IN, 24, k=4)
    (sae,) = SAETrainer(config, TensorSource({"layers.0": with_outliers(640)}), args, held_out).train().values()
    evaluation = sae.config.metadata["evaluation"]
    assert evaluation["num_tokens"] == 98
    assert 0 < evaluation["fvu"] < 1
    assert 0 < sae.config.metadata["training"]["outlier_radius"] < MASSIVE
    assert "more than 10 times as far from the median" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="outlier_ratio=0 must be positive"):
        dataclasses.replace(args, outlier_ratio=0)


def test_nothing_but_outliers_is_no_error():
    source = Inliers(TensorSource({"a": with_outliers(4, every=1)}), {"a": (torch.zeros(D_IN), 1.0)})
    figures = evaluate_store(source, {"a": SAE(SAEConfig(D_IN, 16, k=2))}, progress=False)["a"]
    assert (figures.num_tokens, figures.fvu, figures.l0, figures.dead_fraction) == (0, None, 0, 1)
