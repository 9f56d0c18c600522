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

import torch

from hf_gradtools.gradmem.training import train
from tests.gradmem.training.reference import KILLED, options


def main(folder: Path, kills: int) -> None:
    moments = random.Random(0)
    torch.set_num_threads(1)
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            train(options(folder, **KILLED, resume=(folder / "run.json").exists()))
            os._exit(0)
        if kill < kills:
            if kill % 2:  # while it writes
                deadline = time.time() + 3
                while time.time() < deadline and not list(folder.glob(".checkpoint-*")):
                    time.sleep(0.0005)
                time.sleep(moments.uniform(0.0, 0.004))
            else:
                time.sleep(moments.uniform(0.2, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
