"""What Adam makes of a gradient, as a factor per weight: for queries that ask what a step would change."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..models import differentiated
from ..optimizers import frozen_derivative, unwrap_optimizer


OPTIMIZER_FILE = "optimizer.pt"


def adam_factors(
    state: torch.optim.Optimizer | str | os.PathLike[str] | None, model: nn.Module, parameters: Iterable[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """`(1-β₁)/(1-β₁ᵗ) / (√v̂ + ε)` of every weight: Adam's step along a gradient, with its second moment as it is.

    LESS (Xia et al. 2024, arXiv 2402.04333, §3.1) takes the step of each *training* gradient; being linear in the
    gradient with the moments fixed, it can as well be taken of the query.

    Args:
        state: the optimizer, or the folder of a Trainer checkpoint.
        model: whose parameters it has.
        parameters: those wanted.

    Raises:
        ValueError: there is no state, it is of another model or optimizer, or has made no step.
    """
    if state is None:
        raise ValueError(
            "precondition='adam' needs the second moments: pass GradProjector(..., optimizer_state=optimizer), or the "
            "folder of a Trainer checkpoint"
        )
    optimizer = state if isinstance(state, torch.optim.Optimizer) else load_optimizer(state, model)
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, torch.optim.Adam):
        raise ValueError(f"precondition='adam' needs an Adam or AdamW, optimizer_state is {type(inner).__name__}")
    factors = {}
    for p in parameters:
        factor = frozen_derivative(inner, p)
        if not isinstance(factor, Tensor):
            raise ValueError("optimizer_state has no second moments of a chosen parameter: it has not trained it yet")
        factors[p] = factor
    return factors


def load_optimizer(checkpoint: str | os.PathLike[str], model: nn.Module) -> torch.optim.Optimizer:
    """The AdamW of a Trainer checkpoint, its state assigned to the parameters of the model.

    Raises:
        ValueError: the folder has no `optimizer.pt`, or one of other parameters.
    """
    path = Path(checkpoint) / OPTIMIZER_FILE
    if not path.exists():
        raise ValueError(f"optimizer_state={os.fspath(checkpoint)!r} has no {OPTIMIZER_FILE}; pass a checkpoint-N")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    with differentiated(model):
        # As Trainer orders them: weights that decay first.
        decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in trained if name in decaying]},
            {"params": [p for name, p in trained if name not in decaying]},
        ]
    optimizer = torch.optim.AdamW(groups)
    ordered = [p for group in groups for p in group["params"]]
    shapes = {i: tuple(p.shape) for i, p in enumerate(ordered)}
    moments = {i: values.get("exp_avg_sq") for i, values in stored["state"].items()}
    kept = {i: tuple(v.shape) for i, v in moments.items() if v is not None}
    if not kept or any(shapes.get(i) != shape for i, shape in kept.items()):
        raise ValueError(
            f"{path} holds no second moments of this model's {len(ordered)} trained parameters; pass the checkpoint "
            "that the model was loaded from, made by Trainer with adamw_torch"
        )
    optimizer.load_state_dict(stored)
    return optimizer
