"""Two ranks under Trainer; started by test_distributed.py through torchrun. Writes what it saw and leaves hard."""

import os
import sys
from pathlib import Path

import torch

from tests.ghost.reference import llama, rows, train


def main(path: Path, method: str) -> None:
    rank = int(os.environ["RANK"])
    model = llama()
    options = {"grad_norms": True, "second_order": True} if method == "contraction" else {}
    callback, recorder, _ = train(
        model, rows(18), rows(5, seed=9), path, method=method, val_micro_batch_size=2, **options,
        args={"gradient_accumulation_steps": 2, "max_steps": 3, "output_dir": f"{path}/out{rank}", "optim": "sgd"},
    )  # fmt: skip
    torch.save({"steps": recorder.steps, "weights": model.state_dict()}, path / f"rank{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
