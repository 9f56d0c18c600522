"""What GRIT can be attached to. Everything else is refused here, with the remedy."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from hf_gradtools.core.distributed import is_sharded, world_size
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.layer import SteeredLayer
from hf_gradtools.grit.model import GritModel
from hf_gradtools.grit.moments import check_optimizer


def find_tuner(model: nn.Module) -> GritModel:
    """The GRIT tuner of a model, seen through the wrappers of PEFT, DDP and `torch.compile`.

    Raises:
        ValueError: the model has none.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, GritModel):
        kind = f"an adapter of type {model.peft_type.value}" if isinstance(model, PeftModel) else "no adapter"
        raise ValueError(
            f"{type(model).__name__} has {kind}; GRIT steers get_peft_model(model, GritConfig(...)), or "
            "SFTTrainer(peft_config=GritConfig(...))."
        )
    return tuner


def only_active_adapter(tuner: GritModel) -> str:
    active = tuner.active_adapters
    if len(active) != 1:
        raise ValueError(f"adapters {active} are active; GRIT trains one at a time: call set_adapter(name).")
    return active[0]


def torch_optimizer(optimizer: Any, config: GritConfig) -> torch.optim.Optimizer:
    """The torch optimizer in accelerate's wrapper, if its state can follow what the config does to it."""
    from accelerate.optimizer import AcceleratedOptimizer

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(inner).__name__}, which runs no torch step hooks (DeepSpeed's own do not); GRIT "
            "needs a torch.optim.Optimizer."
        )
    if config.preconditioner == "rank_soap" or (config.reprojection and config.rank_change != "none"):
        check_optimizer(inner)
    return inner


def trainable_layers(tuner: GritModel, adapter: str, optimizer: torch.optim.Optimizer) -> list[SteeredLayer]:
    """The layers whose A and B both train, and whose shapes are their own."""
    layers = [layer for layer in tuner.layers(adapter) if layer.A.requires_grad and layer.B.requires_grad]
    if not layers:
        raise ValueError(f"adapter {adapter!r} has no layer whose A and B both train; load it with is_trainable=True.")
    if any(is_sharded(layer.A) or layer.A.ndim != 2 for layer in layers):
        raise ValueError("FSDP shards the adapter's rank axis, which GRIT needs whole; train with DDP, or use LoRA.")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := [layer.name for layer in layers if layer.A not in owned or layer.B not in owned]:
        raise ValueError(
            f"the optimizer does not hold the adapter of {missing[0]} and {len(missing) - 1} more layers."
        )
    return layers


def rank_change(config: GritConfig) -> str:
    """How ranks change in this process group: "physical", "masked" or "none"."""
    if config.rank_change == "auto":
        return "physical" if world_size() == 1 else "masked"
    if config.rank_change == "physical" and world_size() > 1:
        raise ValueError(
            f"rank_change='physical' in {world_size()} processes: DDP would no longer synchronise the new tensors. "
            "Set rank_change='auto' (or 'masked'); tensors shrink when training ends."
        )
    return config.rank_change


def first_cut_step(config: GritConfig, total_steps: int | None) -> float:
    """The step from which on the adapter is cut; infinity for never."""
    warmup = config.reprojection_warmup_steps
    if config.reprojection is None:
        return math.inf
    if warmup == 0 or warmup >= 1:
        return warmup
    if total_steps is None:
        raise ValueError(
            f"reprojection_warmup_steps={warmup} is a share of training. Pass total_steps= (a Trainer's callback "
            "does), or give the config a number of steps."
        )
    return math.ceil(warmup * total_steps)
