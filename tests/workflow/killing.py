"""Runs that are killed again and again, or interrupted."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers import TrainerCallback


def run_and_kill(run: Callable[[], object], folder: Path, kills: int, seconds: tuple[float, float]) -> NoReturn:
    """Runs in a child process that is killed again and again, and once more to the end; then exits as that did.

    Every other time it is killed while it writes a checkpoint, else after some time. Imports are done before the
    process forks, so an attempt costs none.

    Args:
        run (`Callable`): begins or goes on.
        folder (`Path`): where its checkpoints are written.
        kills (`int`): how often.
        seconds (`tuple[float, float]`): the shortest and the longest time until a kill.
    """
    moments = random.Random(0)
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            run()
            os._exit(0)
        if kill < kills:
            if kill % 2:
                deadline = time.time() + 3
                while time.time() < deadline and not list(folder.glob(".checkpoint-*")):
                    time.sleep(0.0005)
                time.sleep(moments.uniform(0.0, 0.004))
            else:
                time.sleep(moments.uniform(*seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
