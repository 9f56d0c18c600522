"""Two processes see the batches that one process accumulates, and write one run between them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_gradtools.nanogpt.training import train
from hf_gradtools.workflow.checkpoints import last_checkpoint
from tests.nanogpt.training.reference import MODEL, RUN, history, options


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_that_accumulates(dataset, tmp_path):
    flags = {**RUN, **MODEL, "dataset": dataset, "out_dir": tmp_path / "two", "eval_iters": 1}
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port()}"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "hf_gradtools.nanogpt.training.cli", *words],
        env=env,
        timeout=250,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best val loss") == 1
    train(options(dataset, tmp_path / "one", gradient_accumulation_steps=2), MODEL)
    for name in ("loss", "eval_loss"):  # an evaluation's batches are dealt out too
        two, one = ([value for _, value in history(tmp_path / folder, name)] for folder in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-4)
    states = sorted(path.name for path in last_checkpoint(tmp_path / "two").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


def port():
    return 29_500 + os.getpid() % 1000
