"""Configuration of a causal LM with a memory that is written by its forward pass."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_gradmem import GradMemConfig


UNUSED = (
    "grad_mode",
    "last_k_second_order",
    "inner_lr",
    "learn_inner_lr",
    "use_adam",
    "inner_clip_value",
    "inner_clip_norm",
)
UNUSED += ("mem_proj_mode", "use_write_head", "add_inner_loss_to_outer", "recompute_write")


@strict
class RMTConfig(GradMemConfig):
    """What [`RMTForCausalLM`] is made of: of [`GradMemConfig`] what is not about gradient steps.

    Args:
        segment_length (`int`, *optional*): tokens that are read at once; default the whole context.

    Raises:
        ValueError: an option of gradient steps is given.
    """

    model_type = "gradmem_rmt"

    segment_length: int | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        given = [name for name in UNUSED if getattr(self, name) != getattr(GradMemConfig, name)]
        if given:
            raise ValueError(f"{', '.join(given)}: a recurrent memory takes no gradient steps. Leave them out.")
        if self.segment_length is not None and self.segment_length < 1:
            raise ValueError(f"segment_length={self.segment_length} must be at least 1, or None for whole contexts.")


__all__ = ["RMTConfig"]
