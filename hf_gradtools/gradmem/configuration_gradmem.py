"""Configuration of a causal LM with a memory that is written by gradient steps."""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


GRAD_MODES = ("none", "first", "second")
MEM_PROJ_MODES = ("none", "proj", "per_sample")


@strict
class GradMemConfig(PreTrainedConfig):
    """What [`GradMemGPTForCausalLM`] is made of.

    Names are those of the gradmem repository (arXiv 2603.13875).

    Args:
        base_config (`PreTrainedConfig` or `dict`): the backbone's, any causal LM's; a dict needs its "model_type".
        n_mem_tokens (`int`): M, vectors in the memory.
        K (`int`): gradient steps of a write.
        inner_lr (`float`): their learning rate, on each sample's mean loss per token.
        learn_inner_lr (`bool`): whether the learning rate is trained too; `inner_lr` is its first value.
        use_adam (`bool`): Adam for the steps instead of plain gradient descent.
        grad_mode (`str`): how the outer loss reaches what the memory was written from. "none": not; the first memory
            and all that only a write uses stay as they are. "first": inner gradients count as constants.
            "second": fully.
        last_k_second_order (`int`, *optional*): with "second", only the last so many steps; default all.
        n_ctrl_tokens (`int`): learned vectors on each side of the memory, others when writing than when reading.
        inner_clip_value (`float`, *optional*): inner gradients are clamped to ± this.
        inner_clip_norm (`float`, *optional*): then scaled down to this norm, for each sample.
        use_mem_proj (`bool`): whether the model sees a linear map of the memory; then `mem_proj_mode` says which.
        mem_proj_mode (`str`): "none"; "proj": one map, trained by the outer loss alone; "per_sample": each sample
            has its own, which the inner steps change with the memory.
        use_write_head (`bool`): an output layer of its own for writing; starts as a copy of the model's.
        use_write_lora (`bool`): LoRA adapters that are there for writing only.
        write_lora_r, write_lora_alpha, write_lora_dropout (`int`, `int`, `float`): their rank, scale and dropout.
        write_lora_target_modules (`list[str]` or `str`, *optional*): the layers that get one, as PEFT names them;
            default all linear layers but the output layer.
        freeze_backbone (`bool`): the backbone does not train; its adapters do, if it came with some.
        add_inner_loss_to_outer (`bool`): adds `inner_loss_weight` times the inner loss at the last step to the loss.
        inner_loss_weight (`float`): see above.
        recompute_write (`bool`): in "second" mode, keep the graph of one inner step instead of K, and compute the
            others again in the backward pass. Same gradients, if modes and adapters are then as they were.
        backbone_adapter (`dict`, *optional*): the PEFT configuration of the adapter that the backbone came with.

    Raises:
        ValueError: a value is unknown, out of range, or contradicts another.
    """

    model_type = "gradmemgpt"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "memory", "inner_losses"]

    base_config: dict | PreTrainedConfig | None = None
    n_mem_tokens: int = 8
    K: int = 1
    inner_lr: float | int = 0.04
    learn_inner_lr: bool = False
    use_adam: bool = False
    grad_mode: str = "second"
    last_k_second_order: int | None = None
    n_ctrl_tokens: int = 0
    inner_clip_value: float | int | None = None
    inner_clip_norm: float | int | None = None
    use_mem_proj: bool = False
    mem_proj_mode: str = "none"
    use_write_head: bool = False
    use_write_lora: bool = False
    write_lora_r: int = 8
    write_lora_alpha: float | int = 16
    write_lora_dropout: float | int = 0.0
    write_lora_target_modules: list[str] | tuple[str, ...] | str | None = None
    freeze_backbone: bool = False
    add_inner_loss_to_outer: bool = False
    inner_loss_weight: float | int = 0.5
    recompute_write: bool = True
    backbone_adapter: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.base_config, dict):
            self.base_config = _config_from_dict(self.base_config)
        self.base_config = copy.deepcopy(self.base_config)  # settings of ours go to it, and it may be a model's
        if self.base_config is not None:  # what the stack asks a causal LM's configuration for
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(self.base_config, name, None))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            kwargs.pop(name, None)  # the backbone's
        super().__post_init__(**kwargs)
        self.validate_values()

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedConfig.from_dict`, which sets what it is given besides after all checks: they are made again."""
        loaded = super().from_dict(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).validate_values()
        return loaded

    def validate_values(self) -> None:
        """ValueError if a value is unknown, out of range, or contradicts another."""
        _check_choice("grad_mode", self.grad_mode, GRAD_MODES)
        _check_choice("mem_proj_mode", self.mem_proj_mode, MEM_PROJ_MODES)
        for name, least in (("n_mem_tokens", 1), ("K", 0), ("n_ctrl_tokens", 0), ("write_lora_r", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.inner_loss_weight < math.inf:
            raise ValueError(f"inner_loss_weight={self.inner_loss_weight} must be at least 0 and finite.")
        if not 0 <= self.write_lora_dropout < 1:
            raise ValueError(f"write_lora_dropout={self.write_lora_dropout} must be at least 0 and below 1.")
        for name in ("inner_lr", "inner_clip_value", "inner_clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"{name}={value} must be positive and finite" + (", or None." if name != "inner_lr" else ".")
                )
        if self.use_mem_proj != (self.mem_proj_mode != "none"):
            raise ValueError(
                f"use_mem_proj={self.use_mem_proj} contradicts mem_proj_mode={self.mem_proj_mode!r}. Pass "
                'use_mem_proj=True with mem_proj_mode="proj" or "per_sample", or neither.'
            )
        if self.last_k_second_order is not None:
            if self.last_k_second_order < 0:
                raise ValueError(f"last_k_second_order={self.last_k_second_order} must be at least 0, or None for K.")
            if self.grad_mode != "second":
                raise ValueError(
                    f"last_k_second_order={self.last_k_second_order} needs grad_mode='second'; "
                    f"with {self.grad_mode!r} no step is of second order. Leave it out."
                )

    @property
    def vocab_size(self) -> int:
        return self._backbone.vocab_size

    @property
    def hidden_size(self) -> int:
        return self._backbone.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self._backbone.num_hidden_layers

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self._backbone, "max_position_embeddings", None)

    @property
    def _backbone(self) -> PreTrainedConfig:
        if self.base_config is None:
            raise AttributeError(
                "base_config is None, and sizes are the backbone's. Pass base_config=LlamaConfig(...)."
            )
        return self.get_text_config()

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's: it is what caches and generation are about."""
        if not isinstance(self.base_config, PreTrainedConfig):
            return self
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)


def _config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    if "model_type" not in values:
        raise ValueError(
            "base_config is a dict without 'model_type'. Pass a configuration such as LlamaConfig(...), or its dict."
        )
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Pass one of {', '.join(map(repr, choices))}.")


__all__ = ["GradMemConfig"]
