"""Options of `hf-gradtools ghost train`. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_gradtools.workflow.options import RunOptions


@dataclass
class GhostTrainConfig(RunOptions):
    """A causal LM, what it is trained on, and how its training samples are scored.

    Everything of [`RunOptions`] applies.

    Args:
        val: also several sets of validation rows, by name.
        lora: train adapters on all linear layers, or else all weights.
        lora_rank: rank of the adapters.
        learning_rate: default 2e-4 for adapters, 2e-5 for all weights.
        dtype: of the weights; default the checkpoint's for adapters, float32 for all weights.
        val_batch_size, every_steps, layers, method, optimizer_aware, second_order, per_layer, grad_norms,
            sample_losses: see :class:`~hf_gradtools.GhostDotProdConfig`.

    Raises:
        ValueError: a number is out of range.
    """

    val: str | Mapping[str, str] = "0.1"
    lora: bool = True
    lora_rank: int = 16
    learning_rate: float | None = None
    val_batch_size: int = 16
    every_steps: int = 1
    layers: list[str] | None = None
    method: str = "auto"
    optimizer_aware: bool = False
    second_order: bool = False
    per_layer: bool = False
    grad_norms: bool = False
    sample_losses: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(lora_rank=1, val_batch_size=1, every_steps=1)
