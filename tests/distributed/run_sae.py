"""Training of autoencoders on two ranks; started by test_sae_distributed.py through torchrun. Leaves hard."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from torch import distributed

from hf_gradtools.core import atomic
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.trainer import SAETrainer
from hf_gradtools.sae.training_config import SAETrainingConfig
from tests.sae.sources import TensorSource, correlated


D_IN, STEPS = 8, 12
CONFIGS = {
    "layers.0": SAEConfig(D_IN, 32, k=3),
    "layers.1": SAEConfig(D_IN, 24, "jumprelu", sparsity_coefficient=0.01),
    "layers.2": SAEConfig(D_IN, 16, k=2, matryoshka_widths=(8, 16)),
}


def source() -> TensorSource:
    return TensorSource({name: correlated(STEPS * 64, D_IN, seed=i) for i, name in enumerate(CONFIGS)})


def trainer(path: Path, parallel: str, **changes: object) -> SAETrainer:
    args = SAETrainingConfig(
        str(path), batch_tokens=64, buffer_tokens=200, calibration_tokens=100, dead_after_tokens=256, save_steps=5,
        max_grad_norm=0.5, use_cpu=True, parallel=parallel,
    )  # fmt: skip
    return SAETrainer(CONFIGS, source(), dataclasses.replace(args, **changes), eval_source=source())


def main(path: Path) -> None:
    written: list[str] = []
    replace = atomic.os.replace

    def counted(src, dst):
        written.append(str(Path(dst).relative_to(path)))
        replace(src, dst)

    os.replace = counted
    trained = {kind: trainer(path / kind, kind) for kind in ("data", "layers")}
    loaded = {kind: list(one.train()) for kind, one in trained.items()}
    again = trainer(path / "layers", "layers")
    again.train(resume=True)
    result = {
        "written": written,
        "loaded": loaded,
        "hookpoints": {kind: one.own_hookpoints for kind, one in trained.items()},
        "steps_again": len(again.log_history),
        "ranks": distributed.get_world_size(),
    }
    (path / f"rank{distributed.get_rank()}.json").write_text(json.dumps(result))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
