"""GRIT on two ranks under Trainer; started by test_grit_distributed.py through torchrun. Writes what it saw and leaves
hard."""

import os
import sys
from pathlib import Path

import torch

from tests.grit.reference import adapted, rows, trainer


OPTIONS = {"grit_cov_update_freq": 1, "kfac_update_freq": 2, "reprojection_freq": 3, "rank_adaptation_threshold": 0.8}

MEASURED_ONLY = {"reprojection": None, "preconditioner": "kfac", "kfac_min_samples": 10**9}


def train(path: Path, batch_size: int, **options):
    model = adapted(trained=True, **{**OPTIONS, **options})
    args = {
        "per_device_train_batch_size": batch_size, "max_steps": 7, "learning_rate": 1e-3, "ddp_find_unused_parameters":
        False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    run = trainer(model, rows(32, padded=True), path, args=args)
    run.train()
    controller = run.controller
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters() if "lora_" in name},
        "factors": {name: fisher.factors for name, fisher in controller.fishers.items()},
        "samples": {name: fisher.samples for name, fisher in controller.fishers.items()},
        "ranks": controller.live_ranks,
        "shapes": model.base_model.ranks(),
        "change": controller.rank_change,
    }


def main(path: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.save(
        {
            "cut": train(path / f"cut{rank}", 4),
            "uncut": train(path / f"uncut{rank}", 4, **MEASURED_ONLY),
        },
        path / f"rank{rank}.pt",
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
