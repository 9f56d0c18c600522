"""WRITE as pure functions: gradient steps on a batch of memories, and how gradients flow through them.

What a write changes is a tuple of `fast` tensors, one row for each sample: the memories `[B, M, E]`, and with fast
projections their weights `[B, E, E]` and biases `[B, E]`. Adam adds two moments for each.

Legend: B samples, M memory vectors, E hidden size, K steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .configuration_gradmem import GRAD_MODES
from .losses import InnerPass


Fast = tuple[Tensor, ...]
LossFunction = Callable[[Fast, InnerPass], Tensor]  # what the fast tensors cost: `[B]` losses, each of its own row

BETAS, EPSILON = (0.9, 0.999), 1e-8
NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class InnerOptimizer:
    """How a gradient becomes a step.

    Args:
        learning_rate: a number, or a tensor that is learned.
        use_adam: Adam (arXiv 1412.6980, algorithm 1) instead of plain gradient descent.
        clip_value: gradients are clamped to ± this, element by element.
        clip_norm: then each sample's gradient of each tensor is scaled down to this norm.
    """

    learning_rate: float | Tensor
    use_adam: bool = False
    clip_value: float | None = None
    clip_norm: float | None = None

    def start(self, fast: Fast) -> Fast:
        """The state before the first step: what is changed, then what the optimizer keeps of it."""
        return (*fast, *(torch.zeros_like(x) for x in fast * 2)) if self.use_adam else fast

    def step(self, state: Fast, grads: Sequence[Tensor], index: int) -> Fast:
        """The state after step `index`, counted from 0."""
        n = len(grads)
        grads = [clip(grad, self.clip_value, self.clip_norm) for grad in grads]
        if not self.use_adam:
            return tuple(x - self.learning_rate * grad for x, grad in zip(state, grads, strict=True))
        first = [beta_mean(m, g, BETAS[0]) for m, g in zip(state[n : 2 * n], grads, strict=True)]
        second = [beta_mean(v, g * g, BETAS[1]) for v, g in zip(state[2 * n :], grads, strict=True)]
        stepped = [
            x - self.learning_rate * adam_direction(m, v, index + 1)
            for x, m, v in zip(state[:n], first, second, strict=True)
        ]
        return (*stepped, *first, *second)


def clip(grad: Tensor, clip_value: float | None, clip_norm: float | None) -> Tensor:
    """Clamps each element to ± `clip_value`, then scales each sample's norm down to `clip_norm`; grad `[B, …]`."""
    if clip_value is not None:
        grad = grad.clamp(-clip_value, clip_value)
    if clip_norm is not None:
        norm = torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.dim())), keepdim=True)
        grad = grad * (clip_norm / (norm + NORM_EPSILON)).clamp(max=1)
    return grad


def beta_mean(mean: Tensor, value: Tensor, beta: float) -> Tensor:
    """The running mean after one more value."""
    return beta * mean + (1 - beta) * value


def adam_direction(first: Tensor, second: Tensor, count: int) -> Tensor:
    """m̂ / (√v̂ + ε) after `count` steps; where the gradient was always 0 it is 0, and so is its derivative."""
    m_hat, v_hat = first / (1 - BETAS[0] ** count), second / (1 - BETAS[1] ** count)
    is_zero = v_hat == 0
    return torch.where(is_zero, 0, m_hat / (v_hat.masked_fill(is_zero, 1).sqrt() + EPSILON))


def write(
    fast: Fast,
    loss_function: LossFunction,
    optimizer: InnerOptimizer,
    steps: int,
    grad_mode: str = "second",
    last_k_second_order: int | None = None,
    recompute: bool = True,
    keep_last_loss: bool = False,
    parameters: Sequence[Tensor] = (),
) -> tuple[Fast, Tensor]:
    """K steps on the samples' own losses (arXiv 2603.13875: WRITE).

    Args:
        fast: what is changed; its rows are the samples.
        loss_function: their losses `[B]`, each of its own row alone.
        optimizer: how gradients become steps.
        steps: K; 0 changes nothing.
        grad_mode: how the result depends on what it came from. "none": not at all. "first": as if the inner gradients
            were constants. "second": fully. Without gradients enabled nothing depends on anything.
        last_k_second_order: with "second", the earlier steps' gradients are constants.
        recompute: keep the graph of the last step alone, and compute those of the others again in the backward pass:
            memory is that of one step, for one more first-order pass of each of the others.
        keep_last_loss: the last step's losses keep their graph, to be part of the outer loss.
        parameters: everything with a gradient that `loss_function` and `optimizer` use; recomputed steps need it.

    Returns:
        `(fast after K steps, losses [B, K] before each step)`.

    Raises:
        ValueError: `grad_mode` is unknown.
    """
    if grad_mode not in GRAD_MODES:
        raise ValueError(f"grad_mode={grad_mode!r} is unknown. Pass one of {', '.join(map(repr, GRAD_MODES))}.")
    differentiable = torch.is_grad_enabled()
    if not differentiable or grad_mode == "none":
        fast = tuple(x.detach() for x in fast)
    n_second = 0
    if differentiable and grad_mode == "second":
        n_second = steps if last_k_second_order is None else min(last_k_second_order, steps)
    state, losses = optimizer.start(fast), []
    for index in range(steps):
        is_last = index == steps - 1
        keep_loss = keep_last_loss and is_last and differentiable
        if index >= steps - n_second:
            if recompute and not is_last:
                *state, loss = _RecomputedStep.apply(loss_function, optimizer, index, len(fast), *state, *parameters)
            else:
                state, loss = _step(state, loss_function, optimizer, index, len(fast))
        else:
            state, loss = _constant_step(state, loss_function, optimizer, index, len(fast), keep_loss)
        losses.append(loss if keep_loss else loss.detach())
    result = tuple(state[: len(fast)])
    if not differentiable or grad_mode == "none":
        result = tuple(x.detach() for x in result)
    return result, torch.stack(losses, 1) if losses else fast[0].new_empty(len(fast[0]), 0)


def _step(
    state: Fast, loss_function: LossFunction, optimizer: InnerOptimizer, index: int, n_fast: int
) -> tuple[Fast, Tensor]:
    """A step that can be differentiated with its gradient."""
    fast, inner = _with_gradient(state[:n_fast]), InnerPass()
    losses = loss_function(fast, inner)
    grads = inner_gradient(losses, fast, inner, create_graph=True)
    return optimizer.step((*fast, *state[n_fast:]), grads, index), losses


def _constant_step(
    state: Fast, loss_function: LossFunction, optimizer: InnerOptimizer, index: int, n_fast: int, keep_loss: bool
) -> tuple[Fast, Tensor]:
    """A step whose gradient is a constant: its graph is gone at once, unless its losses are to be kept."""
    inner = InnerPass(trained=keep_loss)
    with torch.enable_grad():
        fast = _with_gradient(state[:n_fast] if keep_loss else [x.detach() for x in state[:n_fast]])
        losses = loss_function(fast, inner)
        grads = inner_gradient(losses, fast, inner, retain_graph=keep_loss)
    return optimizer.step(state, [grad.detach() for grad in grads], index), losses


def inner_gradient(losses: Tensor, fast: Fast, inner: InnerPass, **options: Any) -> tuple[Tensor, ...]:
    """Each sample's gradient of its own loss: those of the others do not depend on its row."""
    inner.memory_only = True
    with torch.autocast(losses.device.type, enabled=False):
        grads = torch.autograd.grad(losses.sum(), fast, **options)
    inner.memory_only = False
    return grads


def _with_gradient(tensors: Sequence[Tensor]) -> Fast:
    """The same tensors; those without a gradient as leaves that have one."""
    return tuple(x if x.requires_grad else x.detach().requires_grad_() for x in tensors)


class _RecomputedStep(torch.autograd.Function):
    """One step of which only its input is kept.

    Forward takes the gradient and forgets the graph. Backward takes the step again, now with a graph of the inner
    gradient, and differentiates that: the product with the Hessian is one more reverse pass. Random numbers and
    autocast are those of the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, loss_function: LossFunction, optimizer: InnerOptimizer, index: int, n_fast: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n_state = n_fast * (3 if optimizer.use_adam else 1)
        device = tensors[0].device.type
        ctx.step, ctx.n_state = (loss_function, optimizer, index, n_fast), n_state
        accelerator = device if device != "cpu" else "cuda"  # of a CPU's tensors there are no device states
        ctx.random = (accelerator, torch.get_rng_state(), *get_device_states(*tensors))
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(*tensors)
        state, losses = _constant_step(tensors[:n_state], *ctx.step, keep_loss=False)
        losses = losses.detach()
        ctx.mark_non_differentiable(losses)
        return *state, losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing each access computes them again
        state, parameters = saved[: ctx.n_state], saved[ctx.n_state :]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), _replayed(*ctx.random), torch.autocast(device, dtype=dtype, enabled=enabled):
            state = _with_gradient([x.detach() for x in state])
            stepped, _ = _step(state, *ctx.step)
        wanted = (*state, *(x for x in parameters if x.requires_grad))
        grads = iter(torch.autograd.grad(stepped, wanted, output_grads[: ctx.n_state], allow_unused=True))
        return None, None, None, None, *(next(grads) if x.requires_grad else None for x in (*state, *parameters))


@contextmanager
def _replayed(device_type: str, cpu_state: Tensor, devices: list[int], device_states: list[Tensor]) -> Iterator[None]:
    """Random numbers come from these states; outside, the generators go on as if nothing had been."""
    with torch.random.fork_rng(devices, device_type=device_type):
        torch.set_rng_state(cpu_state)
        set_device_states(devices, device_states, device_type=device_type)
        yield
