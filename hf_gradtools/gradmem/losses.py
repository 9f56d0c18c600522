"""Cross-entropy of a linear layer's outputs that never holds them all, with a first and a second derivative.

Legend: N tokens, E hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import fixed_cross_entropy


IGNORE_INDEX = -100
CHUNK_NUMBERS = 2**23  # logits computed at once


@dataclass
class InnerPass:
    """One evaluation of the inner loss, and which of its gradients are wanted.

    Args:
        trained: whether more than the memory will ever want a gradient of it.
        memory_only: whether the gradient that is being taken is that for the memory alone.
    """

    trained: bool = True
    memory_only: bool = False


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, inner: InnerPass | None = None
) -> Tensor:
    """−log softmax(hidden Wᵀ + b)[label] of every token.

    Args:
        hidden: `[N, E]`.
        weight: `[V, E]`.
        labels: `[N]`; −100 gives a loss of 0.
        bias: `[V]`.
        inner: whether gradients for `weight` and `bias` can be left out at times.

    Returns:
        `[N]`, at least float32. What is kept for both derivatives is the arguments; logits are computed again, by
        chunks of at most 2²³ numbers.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if bias is not None:  # one more input that is always 1
        hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
        weight = torch.cat([weight, bias.to(weight.dtype)[:, None]], 1)
    return _LinearCrossEntropy.apply(hidden, weight, labels, inner or InnerPass())


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Loss of the tokens that follow; transformers' own, which would round float64 to float32.

    Args:
        logits: `[N, Q, V]`.
        labels: `[N, Q]`; −100 does not count.
        num_items_in_batch: what the sum is divided by, default the labels that count.
    """
    logits = logits[:, :-1].to(_at_least_float32(logits)).flatten(0, 1)
    return fixed_cross_entropy(logits, labels[:, 1:].flatten().to(logits.device), num_items_in_batch)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, inner: InnerPass) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.inner = inner
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.cat(
                [
                    nn.functional.cross_entropy(_logits(h, weight), y, ignore_index=IGNORE_INDEX, reduction="none")
                    for h, y in _chunks(weight, hidden, labels)
                ]
            )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[1] and not ctx.inner.memory_only
        if torch.is_grad_enabled() and wants_weight:
            return *_open_vjp(hidden, weight, labels, grad), None, None
        if wants_weight:
            return *_vjp(hidden, weight, labels, grad), None, None
        return _HiddenGrad.apply(hidden, weight, labels, grad), None, None, None


class _HiddenGrad(torch.autograd.Function):
    """g (P − Y) W, the loss's gradient for the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels, grad)
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.cat(
                [
                    (_error(h, weight, y) * g[:, None]).to(weight.dtype) @ weight
                    for h, y, g in _chunks(weight, hidden, labels, grad)
                ]
            )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of φ = ⟨g (P − Y) W, A⟩: with U = A Wᵀ, Z = g P ∘ (U − rowsum(P ∘ U)) is that for the logits."""
        hidden, weight, labels, grad = ctx.saved_tensors
        weight_grad = torch.zeros_like(weight, dtype=_at_least_float32(weight)) if ctx.needs_input_grad[1] else None
        for_hidden, for_grad = [], []
        for h, y, g, a in _chunks(weight, hidden, labels, grad, along):
            probs = _logits(h, weight).softmax(-1)
            counts = (y != IGNORE_INDEX).to(g.dtype)
            score = _logits(a, weight)  # U
            mean = (probs * score).sum(-1, keepdim=True)
            for_grad.append((mean[:, 0] - score.gather(1, y.clamp(min=0)[:, None])[:, 0]) * counts)
            scale = (g * counts)[:, None]
            for_logits = (score.sub_(mean).mul_(probs).mul_(scale)).to(weight.dtype)  # Z
            for_hidden.append(for_logits @ weight)
            if weight_grad is not None:
                error = _minus_one_hot(probs, y).mul_(scale).to(weight.dtype)
                weight_grad += for_logits.T @ h + error.T @ a
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return torch.cat(for_hidden), weight_grad, None, torch.cat(for_grad)


def _vjp(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    weight_grad = torch.zeros_like(weight, dtype=_at_least_float32(weight))
    for_hidden = []
    for h, y, g in _chunks(weight, hidden, labels, grad):
        error = (_error(h, weight, y) * g[:, None]).to(weight.dtype)
        for_hidden.append(error @ weight)
        weight_grad += error.T @ h
    return torch.cat(for_hidden), weight_grad.to(weight.dtype)


def _open_vjp(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same in operations that can be differentiated on, with all logits at once."""
    error = (_error(hidden, weight, labels) * grad[:, None]).to(weight.dtype)
    return error @ weight, error.T @ hidden


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(_at_least_float32(weight))


def _error(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) − one-hot(labels), 0 where the label does not count."""
    counts = (labels != IGNORE_INDEX)[:, None]
    return _minus_one_hot(_logits(hidden, weight).softmax(-1), labels) * counts


def _minus_one_hot(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.scatter_add(1, labels.clamp(min=0)[:, None], -torch.ones_like(probs[:, :1]))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(weight: Tensor, *tensors: Tensor) -> Any:
    rows = max(1, CHUNK_NUMBERS // len(weight))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
