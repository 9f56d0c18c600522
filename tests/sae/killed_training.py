"""Trains in a child process that is killed again and again; started by test_trainer.py as a script.

The parent imports everything once and forks, so an attempt costs no import. It tells the newest step on disk after
each kill, and ends with a run that is not killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo

from hf_gradtools.sae import metrics
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.trainer import SAETrainer
from hf_gradtools.sae.training_config import SAETrainingConfig
from tests.sae.sources import TensorSource, correlated


LATE_IMPORTS = (metrics, torch._dynamo)  # by the end of a training and by its first step
NAMES = ["layers.0", "layers.1", "layers.2"]
D_IN, STEPS = 16, 40


def trainer(path: Path, **changes: object) -> SAETrainer:
    """Three autoencoders with all options on, and a checkpoint every other step."""
    tokens = STEPS * 64
    x = {name: correlated(tokens, D_IN, seed=i) for i, name in enumerate(NAMES)}
    held_out = TensorSource({name: rows[:300] for name, rows in x.items()})
    options: dict[str, object] = {
        "batch_tokens": 64, "buffer_tokens": 700, "save_steps": 2, "logging_steps": 20, "k_start": 8,
        "max_grad_norm": 0.5, "dead_after_tokens": 500, "calibration_tokens": 200, "use_cpu": True,
    }  # fmt: skip
    args = SAETrainingConfig(str(path), **{**options, **changes})
    configs = {
        NAMES[0]: SAEConfig(D_IN, 48, k=4),
        NAMES[1]: SAEConfig(D_IN, 32, "batchtopk", k=4),
        NAMES[2]: SAEConfig(D_IN, 32, "jumprelu"),
    }
    return SAETrainer(configs, TensorSource(x), args, eval_source=held_out)


def run(path: Path) -> None:
    trainer(path).train(resume=True)


def main(path: Path, kills: int, seconds: float) -> None:
    """Kills so often, at moments up to half the `seconds` that a run takes; after one that ended, another begins."""
    moments, number = random.Random(str(path)), 0
    while True:
        folder = path / str(number) / "saes"
        child = os.fork()
        if child == 0:
            os.close(2)
            os.open(os.devnull, os.O_WRONLY)
            run(folder)
            os._exit(0)
        if kills:
            time.sleep(moments.uniform(0.0, seconds / 2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            steps = [int(file.stem[5:]) for file in folder.glob("checkpoints/*/step-*.safetensors")]
            print(max(steps, default=0))
            kills -= 1
        elif status or not kills:
            sys.exit(os.waitstatus_to_exitcode(status))
        else:
            number += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
