"""A run that is killed and goes on gives exactly what an uninterrupted one gives: dropout and data order included."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf_gradtools.nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.data import TokenFolder, prepare
from hf_gradtools.nanogpt.training import run_flags, train
from hf_gradtools.nanogpt.training.trainer import BlockTrainer
from hf_gradtools.workflow.checkpoints import last_checkpoint, list_checkpoints, write_folder
from tests.nanogpt.training.killed_run import DROPOUT, RUN
from tests.nanogpt.training.reference import MODEL, TEXT, make_dataset, options
from tests.workflow.killing import Interrupt


def logged(out_dir):
    state = json.loads((out_dir / "trainer_state.json").read_text())
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in numbers(state)]


def numbers(state):
    return [row for row in state["log_history"] if "train_loss" not in row]


@pytest.mark.parametrize(
    ("run", "model"),
    [
        ({}, {"dropout": 0.3}),
        ({"gradient_accumulation_steps": 3}, {"dropout": 0.3, "attention_variant": "ssm"}),
        ({"log_interval": 3, "always_save_checkpoint": False}, {}),
    ],
)
@pytest.mark.parametrize("step", [3, 9])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(step, run, model, dataset, tmp_path, monkeypatch):
    config = {**MODEL, **model}
    train(options(dataset, tmp_path / "whole", **run), config)
    train(options(dataset, tmp_path / "cut", max_iters=1, seed=2), config)  # is replaced
    with monkeypatch.context() as patched:
        begin = BlockTrainer.train

        def interrupted(self, **kwargs):
            self.add_callback(Interrupt(step))
            return begin(self, **kwargs)

        patched.setattr(BlockTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(options(dataset, tmp_path / "cut", **run, overwrite_out_dir=True), config)
    assert "iter_latency_ms" not in json.loads((tmp_path / "cut" / "training.json").read_text())  # as if finished
    train(options(dataset, tmp_path / "cut", **run, init_from="resume"), None)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.timeout(400)
def test_killed_at_random_moments(dataset, tmp_path):
    script = [sys.executable, "-m", "tests.nanogpt.training.killed_run", dataset, str(tmp_path / "killed"), "8"]
    subprocess.run(script, check=True, timeout=300)
    train(options(dataset, tmp_path / "whole", **RUN), DROPOUT)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    for name in ("model.safetensors", "checkpoint-40/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list_checkpoints(tmp_path / "killed")) <= 2


def test_a_run_that_goes_on_without_checkpoints_leaves_the_model_of_the_last_one(dataset, tmp_path):
    train(options(dataset, tmp_path, max_iters=4), MODEL)
    model = (tmp_path / "model.safetensors").read_bytes()
    more = {"max_iters": 12, "lr_decay_iters": 4, "init_from": "resume", "never_save_checkpoint": True}
    result = train(options(dataset, tmp_path, **more), MODEL)
    assert result.best_val_iter > 4
    assert json.loads((tmp_path / "training.json").read_text())["best_val_iter"] == result.best_val_iter
    assert (tmp_path / "model.safetensors").read_bytes() == model


def test_data_prepared_anew_is_noticed(tmp_path):
    data = make_dataset(tmp_path)
    train(options(data, tmp_path / "out", max_iters=4), MODEL)
    train(options(data, tmp_path / "out", max_iters=5, lr_decay_iters=4, init_from="resume"))
    (tmp_path / "input.txt").write_text(TEXT[::-1])
    prepare(str(tmp_path / "input.txt"), data, overwrite=True)
    with pytest.raises(ValueError, match="was begun with other data than is in"):
        train(options(data, tmp_path / "out", max_iters=6, lr_decay_iters=4, init_from="resume"))


def test_a_resumed_model_is_what_is_asked_for_in_every_field(dataset, tmp_path):
    config = NanoGPTConfig(vocab_size=TokenFolder(dataset).vocab_size, dropout=0.1, **{**MODEL, "n_layer": 1})
    train(options(dataset, tmp_path, max_iters=4), config)
    resume = options(dataset, tmp_path, max_iters=4, init_from="resume", eval_only=True)
    assert train(resume, config).best_val_iter == 4
    for other in (NanoGPTConfig(block_size=8), {"n_layer": 12}, {"dropout": 0.9}, {**MODEL, "dropout": 0.9}):
        with pytest.raises(ValueError, match="but the model of init_from=.* Leave .* out"):
            train(resume, other)


def test_a_run_resumed_for_longer_is_resumed_so_again(dataset, tmp_path):
    train(options(dataset, tmp_path, max_iters=4), MODEL)
    longer = {"init_from": "resume", "out_dir": str(tmp_path), "max_iters": 12, "lr_decay_iters": 4}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(BlockTrainer, "train", lambda self, **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_flags(longer)
    assert run_flags({"init_from": "resume", "out_dir": str(tmp_path)}).iters == 12


def test_a_finished_run_has_nothing_left_to_do(dataset, tmp_path):
    first = train(options(dataset, tmp_path / "out"), MODEL)
    (tmp_path / "out" / "model.safetensors").unlink()  # killed before it was copied
    again = train(options(dataset, tmp_path / "out", init_from="resume"))
    assert again == first
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_longer_run_goes_on_along_the_same_schedule(dataset, tmp_path):
    whole = options(dataset, tmp_path / "whole", max_iters=12, lr_decay_iters=12)
    train(whole, MODEL)
    train(options(dataset, tmp_path / "short", max_iters=8, lr_decay_iters=12), MODEL)
    train(options(dataset, tmp_path / "short", max_iters=12, lr_decay_iters=12, init_from="resume"))
    assert logged_losses(tmp_path / "short") == logged_losses(tmp_path / "whole")


def logged_losses(out_dir):
    return [row["loss"] for row in logged(out_dir) if "loss" in row]


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path):
    def die(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    write_folder(tmp_path / "checkpoint-3", lambda folder: (folder / "a").write_text("whole"))
    for name in ("checkpoint-3", "checkpoint-6"):
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / name, die)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-3" / "a").read_text() == "whole"
    write_folder(tmp_path / "checkpoint-6", lambda folder: (folder / "a").write_text("new"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]
