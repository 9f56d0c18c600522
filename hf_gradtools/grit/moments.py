"""An optimizer's memory under a change of coordinates.

Shape letters: R rank, K new rank. If gradients transform by a matrix, `g' = map @ g`, so do averages of gradients;
averages of their squares transform by the matrix's squared entries, exactly if the old coordinates were uncorrelated
(as they are in the Fisher eigenbasis), else as an approximation that keeps them positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Parameter


KNOWN_OPTIMIZERS = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
LINEAR = {"exp_avg", "momentum_buffer", "grad_avg"}
SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for an optimizer whose state cannot be carried into other coordinates."""
    if not isinstance(optimizer, KNOWN_OPTIMIZERS):
        raise ValueError(
            f"the state of {type(optimizer).__module__}.{type(optimizer).__name__} cannot follow a change of basis or "
            "rank. Train with optim='adamw_torch', or set preconditioner=None (or 'kfac') and reprojection=None."
        )


def change_basis(optimizer: torch.optim.Optimizer, parameter: Parameter, transform: Callable[[Tensor], Tensor],
                 squared: Callable[[Tensor], Tensor]) -> None:  # fmt: skip
    """Applies `transform` to the averages of gradients in a parameter's state, `squared` to those of their squares."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if name in LINEAR and value is not None:
            state[name] = transform(value.double()).to(value.dtype)
        elif name in SQUARED:
            state[name] = squared(value.double()).to(value.dtype)
    if "grad_avg" in state:  # centred RMSprop takes the root of their difference
        state["square_avg"] = torch.maximum(state["square_avg"], state["grad_avg"].square())


def replace_parameter(optimizer: torch.optim.Optimizer, old: Parameter, new: Parameter) -> None:
    """Lets an optimizer go on with `new`, with the state and options it has for `old`."""
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)
