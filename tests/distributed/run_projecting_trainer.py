"""Two ranks train and project their batches; started by ghost/gradproj/test_training_batches.py through torchrun."""

import os
import sys
from pathlib import Path

import torch

from tests.ghost.gradproj.test_training_batches import train
from tests.ghost.reference import llama, rows


if __name__ == "__main__":
    path = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    args = {"output_dir": f"{path}/out{rank}", "optim": "sgd"}
    _, recorder = train(llama(), rows(18), path, args=args)
    torch.save(recorder.steps, path / f"rank{rank}.pt")
    sys.stdout.flush()
    os._exit(0)
