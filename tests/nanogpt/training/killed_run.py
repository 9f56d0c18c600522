"""Trains in a child process that is killed again and again; started by test_resume.py as a script.

The parent imports everything once and forks, so an attempt costs no import.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from hf_gradtools.nanogpt.training import train
from hf_gradtools.workflow.checkpoints import last_checkpoint
from tests.nanogpt.training.reference import MODEL, options


RUN = {"max_iters": 40, "eval_interval": 4, "gradient_accumulation_steps": 2}
DROPOUT = {**MODEL, "dropout": 0.3}


def run(dataset: str, out_dir: Path) -> None:
    init_from = "resume" if last_checkpoint(out_dir) else "scratch"
    train(options(dataset, out_dir, **RUN, init_from=init_from), DROPOUT)


def main(dataset: str, out_dir: Path, kills: int) -> None:
    moments = random.Random(0)
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            run(dataset, out_dir)
            os._exit(0)
        if kill < kills:
            if kill % 2:  # while it writes
                deadline = time.time() + 3
                while time.time() < deadline and not list(out_dir.glob(".checkpoint-*")):
                    time.sleep(0.0005)
                time.sleep(moments.uniform(0.0, 0.004))
            else:
                time.sleep(moments.uniform(0.0, 0.8))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
