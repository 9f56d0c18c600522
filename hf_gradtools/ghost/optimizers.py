"""What an optimizer makes of a gradient: derivatives of its update in the gradient it is given.

In-run values assume plain SGD unless told otherwise: an update of `-lr · g`. Adam's is `-lr · m̂ / (√v̂ + ε)`, so a
sample's gradient moves each weight by a different amount. All optimizers here act weight by weight, so the derivative
is one factor per weight, and scaling the validation gradient with it makes every dot product "optimizer-aware".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer in accelerate's wrapper.

    Raises:
        ValueError: its update is not one that this module differentiates.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    inner: torch.optim.Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if type(inner) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise ValueError(
            f"optimizer_aware values are defined for torch's SGD, Adam and AdamW, not for {type(inner).__name__}; "
            "train with TrainingArguments(optim='adamw_torch') or set optimizer_aware=False"
        )
    if any(group.get("maximize") for group in inner.param_groups):
        raise ValueError("optimizer_aware values need maximize=False in every parameter group")
    return inner


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, float]:
    """The current learning rate of every parameter."""
    return {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def frozen_derivative(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor | float:
    """∂(-update/lr)/∂gradient with the second moment as it stands *before* the step.

    Known before backward starts, so it costs nothing per sample. For Adam (Kingma & Ba 2015, Algorithm 1)
    `(1-β₁)/(1-β₁ᵗ) / (√v̂_(t-1) + ε)`: the effect of this step alone; what momentum carries into later steps is not
    counted (all of it would be larger by `(1-β₁ᵗ)/(1-β₁)`). Before the first step there is no second moment and the
    update is the gradient's sign, whose derivative is 0.

    Returns:
        a factor per weight, shaped like the parameter, or one for all.
    """
    group, state = _group(optimizer, parameter), optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd_derivative(group, state)
    if not state:
        return 0.0
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    second_moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    denominator = (second_moment / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    return (1 - beta1) / (1 - beta1 ** (steps + 1)) / denominator


def exact_derivative(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grad: Tensor) -> Tensor | float:
    """∂(-update/lr)/∂gradient at the gradient of this step, the second moment's own dependence on it included.

    Args:
        optimizer: just before its step.
        parameter: one of its parameters.
        grad: what the step will use as its gradient.

    Raises:
        ValueError: for `amsgrad`, whose maximum has no derivative.
    """
    group, state = _group(optimizer, parameter), optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd_derivative(group, state)
    if group["amsgrad"]:
        raise ValueError("optimizer_aware='exact' is not defined for amsgrad=True; use optimizer_aware=True")
    if isinstance(optimizer, torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW):
        grad = grad + group["weight_decay"] * parameter
    beta1, beta2 = group["betas"]
    steps = float(state["step"]) + 1 if state else 1.0
    first, second = (state["exp_avg"], state["exp_avg_sq"]) if state else (0.0, 0.0)
    first = (beta1 * first + (1 - beta1) * grad) / (1 - beta1**steps)
    root = ((beta2 * second + (1 - beta2) * grad.square()) / (1 - beta2**steps)).sqrt()
    denominator = root + group["eps"]
    root_slope = torch.where(root > 0, (1 - beta2) / (1 - beta2**steps) * grad / root, 0.0)
    return (1 - beta1) / (1 - beta1**steps) / denominator - first * root_slope / denominator.square()


def _sgd_derivative(group: dict[str, Any], state: dict[str, Any]) -> float:
    momentum = group["momentum"]
    if momentum == 0:
        return 1.0
    started = state.get("momentum_buffer") is not None
    buffer_share = 1 - group["dampening"] if started else 1.0
    return 1 + momentum * buffer_share if group["nesterov"] else buffer_share


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    raise ValueError("a scored parameter is not in the optimizer; leave it out by layers=... or freeze it")
