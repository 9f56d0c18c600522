"""Trains in a child process that is killed again and again; started by test_resume.py as a script."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hf_gradtools.gradmem.training import train
from tests.gradmem.training.reference import KILLED, options
from tests.workflow.killing import run_and_kill


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    run_and_kill(
        lambda: train(options(out, **KILLED, resume=(out / "run.json").exists())), out, int(sys.argv[2]), (0.2, 1.0)
    )
