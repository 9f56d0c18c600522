"""Options of `hf-gradtools grit train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_gradtools.workflow.options import RunOptions


@dataclass
class GritTrainConfig(RunOptions):
    """A causal LM, what it is trained on, and the GRIT adapter that learns it.

    Everything of [`RunOptions`] applies. Options that are `None` are the preset's, or else the defaults of
    [`~hf_gradtools.GritConfig`].

    Args:
        qlora: quantise the base model to 4 bits (NF4, doubly); needs bitsandbytes.
        preset: "short", "long" or "seed", see [`~hf_gradtools.GritConfig.preset`].
        rank: of every layer's adapter when training starts.
        alpha: of LoRA, default 2 × rank.
        rank_adaptation_threshold: share of the spectrum that a cut keeps.
        preconditioner: "rank_soap", "kfac", "grit", or "none".
        reprojection: "balanced", "two_sided", "one_sided", or "none".
        target_modules: "all-linear", or names of layers separated by commas.
        learning_rate: the highest of the schedule.
        warmup: optimizer steps over which the learning rate rises, or their share if below 1.
        lr_scheduler_type: of Trainer, such as "linear" or "cosine".
        gradient_checkpointing: compute activations twice and save their memory.
        eval_steps: optimizer steps between evaluations; the first and the last take place anyway.
        logging_steps: optimizer steps between logs.
        dtype: of the weights that are not quantised; default the checkpoint's.

    Raises:
        ValueError: a number is out of range.
    """

    free: ClassVar[set[str]] = RunOptions.free | {"eval_steps", "logging_steps"}

    qlora: bool = False
    preset: str | None = None
    rank: int = 16
    alpha: int | None = None
    rank_adaptation_threshold: float | None = None
    preconditioner: str | None = None
    reprojection: str | None = None
    target_modules: str = "all-linear"
    learning_rate: float = 2e-4
    warmup: float = 0.0
    lr_scheduler_type: str = "linear"
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    logging_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(rank=1, alpha=1, eval_steps=1, logging_steps=1, warmup=0)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive, such as 2e-4.")
