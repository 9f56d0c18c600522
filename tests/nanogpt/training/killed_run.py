"""Trains in a child process that is killed again and again; started by test_resume.py as a script."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_gradtools.nanogpt.training import train
from hf_gradtools.workflow.checkpoints import last_checkpoint
from tests.nanogpt.training.reference import MODEL, options
from tests.workflow.killing import run_and_kill


RUN = {"max_iters": 40, "eval_interval": 4, "gradient_accumulation_steps": 2}
DROPOUT = {**MODEL, "dropout": 0.3}


def run(dataset: str, out_dir: Path) -> None:
    init_from = "resume" if last_checkpoint(out_dir) else "scratch"
    train(options(dataset, out_dir, **RUN, init_from=init_from), DROPOUT)


if __name__ == "__main__":
    out = Path(sys.argv[2])
    run_and_kill(lambda: run(sys.argv[1], out), out, int(sys.argv[3]), (0.0, 0.8))
