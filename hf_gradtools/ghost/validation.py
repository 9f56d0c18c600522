"""Gradients and Hessian-vector products of a validation loss at the current weights, leaving no trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core.distributed import all_reduce_sum, full_tensor, is_sharded, world_size


Batch = Any
LossFn = Callable[[nn.Module, Batch], Tensor]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    loss: Tensor = model(**batch)["loss"]
    return loss


def count_targets(batch: Batch, shifts_labels: bool) -> int:
    """Label entries that the mean loss of a batch is taken over (batches without "labels" count as one).

    Args:
        batch: with `labels` `[rows]` or `[rows, S]`, −100 where ignored.
        shifts_labels: the model predicts the next token, so the first label of a row is never a target.
    """
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        return 1
    labels = batch["labels"]
    if shifts_labels and labels.ndim > 1:
        labels = labels[:, 1:]
    return int((labels != -100).sum()) if not labels.is_floating_point() else len(labels)


def validation_gradient(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[tuple[Batch, int]],
    loss_fn: LossFn,
    total: int | None = None,
) -> list[Tensor]:
    """Gradient of the validation loss, the mean over all targets of all batches of all ranks.

    Args:
        model: the unwrapped model, evaluated in eval mode; its `.grad`, random state and modes are left as they were.
        parameters: what to differentiate in.
        batches: this rank's batches, each with its number of targets.
        loss_fn: the mean loss of a batch.
        total: targets that the mean is over, where `batches` are only part of them.

    Returns:
        one gradient per parameter, whole on every rank, zero where the loss does not depend on it.
    """
    total = total or total_targets(batches, parameters[0].device)
    gradients: list[Tensor | None] = [None] * len(parameters)
    trainable = {p: None for p in (*parameters, *model.parameters()) if p.requires_grad}
    with evaluating(model), torch.enable_grad():
        for batch, count in batches:
            if count:
                loss = loss_fn(model, batch) * (count / total)
                gradients = _add(gradients, _gradients(loss, parameters, trainable))
    whole = [
        torch.zeros(p.shape, dtype=p.dtype, device=p.device) if gradient is None else gradient
        for p, gradient in zip(parameters, gradients, strict=True)
    ]
    if not any(is_sharded(p) for p in parameters):
        all_reduce_sum(whole)
    return whole


def hessian_vector_product(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[tuple[Batch, int]],
    loss_fn: LossFn,
    vector: Sequence[Tensor],
) -> list[Tensor]:
    """H·u of the validation loss of :func:`validation_gradient`, by differentiating ⟨gradient, u⟩.

    Attention runs in its plain form, since fused kernels have no second derivative. Costs about three times the
    gradient.
    """
    total = total_targets(batches, parameters[0].device)
    products: list[Tensor | None] = [None] * len(parameters)
    with evaluating(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch, count in batches:
            if not count:
                continue
            loss = loss_fn(model, batch) * (count / total)
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            inner = sum((g * u).sum() for g, u in zip(first, vector, strict=True) if g is not None and g.requires_grad)
            if not isinstance(inner, Tensor):
                continue
            products = _add(products, torch.autograd.grad(inner, parameters, allow_unused=True))
    whole = [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, products, strict=True)]
    all_reduce_sum(whole)
    return whole


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards the modes and the random state of before."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _add(totals: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Sums entry by entry; None is zero. Never in place, since autograd may hand out one tensor for several
    parameters; each part is let go as soon as it is added."""
    left = list(parts)
    sums: list[Tensor | None] = list(totals)
    for i, total in enumerate(sums):
        part, left[i] = left[i], None
        if part is not None:
            sums[i] = part if total is None else total + part
    return sums


def total_targets(batches: Sequence[tuple[Batch, int]], device: torch.device) -> int:
    """Targets of all batches of all ranks.

    Raises:
        ValueError: there are none.
    """
    total = torch.tensor(sum(count for _, count in batches), device=device)
    all_reduce_sum([total])
    if total == 0:
        raise ValueError(
            "the validation batches have no label that counts (all are -100 or missing); pass a val_dataset whose "
            "rows have 'labels', or a data_collator that makes them"
        )
    return int(total)


def _gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], trainable: Iterable[nn.Parameter]
) -> Sequence[Tensor | None]:
    if not any(is_sharded(p) for p in parameters):
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    # FSDP2 reduces gradients (to their mean over ranks) only on their way into `.grad`. The list of parameters comes
    # from before the forward, which leaves whole ones in place of the root's sharded ones.
    kept = {p: p.grad for p in trainable}
    for p in kept:
        p.grad = None
    (loss * world_size()).backward()
    found = [None if p.grad is None else full_tensor(p.grad) for p in parameters]
    for p, grad in kept.items():
        p.grad = grad
    return found
