"""A run that is killed and goes on gives exactly what an uninterrupted one gives: dropout, data and stage included."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_gradtools.gradmem.training import train
from hf_gradtools.gradmem.training.trainer import GradMemTrainer
from hf_gradtools.workflow.checkpoints import list_checkpoints
from tests.gradmem.training.reference import KILLED, column, history, options
from tests.workflow.killing import Interrupt


@pytest.mark.timeout(300)
def test_killed_at_random_moments(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    script = [sys.executable, "-m", "tests.gradmem.training.killed_run", str(killed), "6"]
    subprocess.run(script, check=True, timeout=250)
    train(options(whole, **KILLED))
    assert history(killed) == history(whole)
    assert column(whole, "eval_stage")[0] == 0
    assert column(whole, "eval_stage")[-1] == 1
    for name in ("model.safetensors", "checkpoint-24/model.safetensors", "checkpoint-24/optimizer.pt"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert len(list_checkpoints(killed)) <= 2


@pytest.mark.parametrize("run", [{"vanilla": True}, {"grad_mode": "first", "add_inner_loss_to_outer": True}])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    train(options(tmp_path / "whole", **run))
    begin = GradMemTrainer.train

    def interrupted(self, **kwargs):
        self.add_callback(Interrupt(5))
        return begin(self, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(GradMemTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path / "cut", **run))
    train(options(tmp_path / "cut", **run, resume=True))
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    first = train(options(tmp_path))
    (tmp_path / "model.safetensors").unlink()  # killed before it was copied
    again = train(options(tmp_path, resume=True))
    same = ("metrics", "steps", "best_step", "stages", "wrong_context_exact_match")
    assert [again[name] for name in same] == [first[name] for name in same]
    assert (tmp_path / "model.safetensors").exists()


def test_a_longer_run_goes_on(tmp_path):
    train(options(tmp_path / "short", max_steps=4))
    train(options(tmp_path / "short", max_steps=6, resume=True))
    train(options(tmp_path / "whole", max_steps=6))
    assert column(tmp_path / "short", "eval_loss") == column(tmp_path / "whole", "eval_loss")


def test_a_resumed_run_shares_its_options(tmp_path):
    train(options(tmp_path))
    with pytest.raises(ValueError, match=r"begun with learning_rate=0.01, not 0.5. Resume with the same options"):
        train(options(tmp_path, resume=True, learning_rate=0.5))
    with pytest.raises(ValueError, match="holds checkpoint-6 of an earlier run. Continue it by resume=True"):
        train(options(tmp_path))
    with pytest.raises(ValueError, match="holds no run to continue"):
        train(options(tmp_path / "other", resume=True))
