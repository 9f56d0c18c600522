"""A curriculum goes from stage to stage within one run, and a resumed run is in the stage that it was in."""

from __future__ import annotations

import json

import pytest

from hf_gradtools.gradmem.training import train
from hf_gradtools.gradmem.training.stages import FreshRows
from tests.gradmem.training.reference import column, options


def pairs_trained_on(monkeypatch):
    """Number of pairs of every training row that is asked for."""
    pairs, rows = [], FreshRows.rows

    def noted(self, numbers):
        if self.split == "train":
            pairs.extend(self.config.num_pairs for _ in numbers)
        return rows(self, numbers)

    monkeypatch.setattr(FreshRows, "rows", noted)
    return pairs


CURRICULUM = {"curriculum_levels": "1,2,3", "curriculum_threshold": 0.0, "per_device_batch_size": 2}


def test_stages_follow_each_other_in_one_run(tmp_path, monkeypatch):
    """At a threshold of 0 each evaluation ends a stage: the one before training ends the first."""
    pairs = pairs_trained_on(monkeypatch)
    result = train(options(tmp_path, **CURRICULUM))
    assert pairs[: 2 * 6] == [2] * 2 * 2 + [3] * 4 * 2
    assert column(tmp_path, "eval_stage") == [0, 1, 2, 2]
    assert [stage["task"] for stage in result["stages"]] == ["N1-K1V1-V4", "N2-K1V1-V4", "N3-K1V1-V4"]
    assert [stage["last_step"] for stage in result["stages"]] == [0, 2, 6]
    assert (result["task"], result["num_pairs"]) == ("N3-K1V1-V4", 3)
    assert "N2-K1V1-V4 | 2 |" in (tmp_path / "README.md").read_text()


def test_a_stage_that_is_not_learned_goes_on(tmp_path):
    result = train(options(tmp_path, **{**CURRICULUM, "curriculum_threshold": 1.5}))
    assert column(tmp_path, "eval_stage") == [0, 0, 0, 0]
    assert len(result["stages"]) == 1


def test_a_resumed_run_is_in_its_stage(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(options(whole, **CURRICULUM))
    train(options(cut, **CURRICULUM, max_steps=2))
    pairs = pairs_trained_on(monkeypatch)
    train(options(cut, **CURRICULUM, max_steps=6, resume=True))
    assert pairs[: 2 * 4] == [3] * 4 * 2
    assert column(cut, "eval_loss") == column(whole, "eval_loss")
    figures = [json.loads((folder / "results.json").read_text())["stages"] for folder in (whole, cut)]
    assert figures[0] == figures[1]


def test_levels_that_are_none(tmp_path):
    for levels, message in (("2,x", "pass numbers"), ("0,2", "must be positive"), ("2,2", "each given once")):
        with pytest.raises(ValueError, match=message):
            options(tmp_path, curriculum_levels=levels)
