"""Runs that stop and go on: the dataset has every sample of every step once, as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_gradtools import load_ghost_dataset
from tests.ghost.reference import gpt2, llama, rows, train
from tests.ghost.test_models import adapted


VAL = rows(12, seed=9)
COMPARED = ["step", "sample_id", "dot_product", "learning_rate", "sample_hash"]


def as_rows(dataset):
    return sorted(zip(*[dataset[c][:] for c in COMPARED], strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_in_mid_epoch_gives_the_rows_of_an_uninterrupted_run(accumulation, tmp_path):
    args = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "gradient_accumulation_steps": accumulation}
    options = {"val_batch_size": 4}
    whole, _, _ = train(llama(), rows(14), VAL, tmp_path / "whole", args=args, **options)
    train(llama(), rows(14), VAL, tmp_path / "cut", args=args, **options, callbacks=[stop_after(7)], trainer=tolerant)
    part = load_ghost_dataset(tmp_path / "cut" / "ghost")
    assert max(part["step"]) == 7
    resumed, _, _ = train(llama(), rows(14), VAL, tmp_path / "cut", args=args, **options, trainer=resuming)
    assert as_rows(resumed.dataset) == as_rows(whole.dataset)


def stop_after(step):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Interrupt()


def tolerant(**kwargs):
    from transformers import Trainer

    class Tolerant(Trainer):
        def train(self, *args, **kw):
            with pytest.raises(KeyboardInterrupt):
                super().train(*args, **kw)

    return Tolerant(**kwargs)


def resuming(**kwargs):
    from transformers import Trainer

    class Resuming(Trainer):
        def train(self, *args, **kw):
            return super().train(resume_from_checkpoint=True)

    return Resuming(**kwargs)


def test_after_ctrl_c_close_leaves_the_model_clean(tmp_path):
    model = llama()
    callback, _, _ = train(
        model, rows(9), VAL, tmp_path, args={"max_steps": 5}, callbacks=[stop_after(2)], trainer=tolerant
    )
    callback.close()
    assert len(callback.dataset) == 6
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__, name
        assert not module._forward_hooks, name


def test_finished_run_is_not_overwritten(tmp_path):
    train(llama(), rows(9), VAL, tmp_path)
    with pytest.raises(ValueError, match=r"rows of a finished run.*overwrite_output_dir=True"):
        train(llama(), rows(9), VAL, tmp_path)
    callback, _, _ = train(llama(), rows(9), VAL, tmp_path, overwrite_output_dir=True)
    assert len(callback.dataset) == 9


def test_killed_run_without_checkpoint_starts_afresh(tmp_path):
    train(llama(), rows(9), VAL, tmp_path, callbacks=[stop_after(2)], trainer=tolerant)
    callback, _, _ = train(llama(), rows(9), VAL, tmp_path)
    assert sorted(callback.dataset["step"]) == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_store_of_another_model_or_setting_is_refused(tmp_path):
    train(llama(), rows(9), VAL, tmp_path)
    with pytest.raises(ValueError, match="val_batch_size"):
        train(llama(), rows(9), VAL, tmp_path, val_batch_size=2)
    with pytest.raises(ValueError, match="model_class"):
        train(gpt2(), rows(9), VAL, tmp_path)


def test_store_of_another_base_of_the_same_shape_is_refused(tmp_path):
    train(adapted(llama(), target_modules=["q_proj"]), rows(9), VAL, tmp_path)
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="frozen_weights"):
        train(adapted(other, target_modules=["q_proj"]), rows(9), VAL, tmp_path)


@pytest.mark.timeout(400)
def test_killed_twenty_times_at_random_moments(tmp_path):
    script = [sys.executable, "-m", "tests.ghost.killed_run"]
    subprocess.run([*script, str(tmp_path / "killed"), "20"], check=True, timeout=380)
    subprocess.run([*script, str(tmp_path / "whole"), "0"], check=True, timeout=100)
    killed, whole = (load_ghost_dataset(tmp_path / name / "ghost") for name in ("killed", "whole"))
    keys = list(zip(killed["step"][:], killed["sample_id"][:], strict=True))
    assert len(keys) == len(set(keys)) == len(whole)
    assert as_rows(killed) == as_rows(whole)
