"""Layers that per-sample gradients are wanted of, one call of such a layer, and calling it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


if TYPE_CHECKING:
    from .layers import Rule


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own that are scored.

    Attributes:
        name: dotted name in the model.
        module: the module.
        parameters: the scored parameters, by name relative to `module`.
        rule: how its calls become figures.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    rule: Rule


@dataclass
class LayerCall:
    """One call of a layer, as the backward pass completes it.

    Attributes:
        args, kwargs: what the module was called with, detached.
        output_grads: gradients of its output tensors (None where an output was not used).
        parameters: all parameters of the module as the call used them, for layers that are called again.
        rng_state: random state before the call, likewise.
        autocast: the reduced precision that the call ran under, likewise.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_grads: tuple[Tensor | None, ...]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    rng_state: Tensor | None = None
    autocast: torch.dtype | None = None

    @property
    def activations(self) -> Tensor:
        """The input of a layer that takes a single tensor."""
        return next(leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))

    @property
    def output_grad(self) -> Tensor:
        """The output gradient of a layer that returns a single tensor."""
        (grad,) = self.output_grads
        assert grad is not None
        return grad


def directional_derivative(layer: Layer, call: LayerCall, direction: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """J·G of each output tensor: the layer's forward is replayed and differentiated along `direction` in its
    parameters, by forward-mode AD, or twice in reverse mode where an operator has no forward mode."""
    primals = {name: call.parameters[name] for name in direction}
    tangents = {name: target.to(primals[name].dtype) for name, target in direction.items()}

    def forward(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        output = functional_call(layer.module, {**call.parameters, **values}, call.args, call.kwargs)
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())

    with _replaying(call):
        try:
            derivative: tuple[Tensor, ...] = torch.func.jvp(forward, (primals,), (tangents,))[1]
            return derivative
        except NotImplementedError:
            pass
    with _replaying(call), torch.enable_grad():
        leaves = {name: value.clone().requires_grad_() for name, value in primals.items()}
        outputs = forward(leaves)
        dummies = [torch.zeros_like(out, requires_grad=True) for out in outputs]
        pulled = torch.autograd.grad(outputs, list(leaves.values()), dummies, create_graph=True, allow_unused=True)
        products = [(p * tangents[n]).sum() for n, p in zip(leaves, pulled, strict=True) if p is not None]
        pushed = torch.autograd.grad(products, dummies, allow_unused=True)
    return tuple(torch.zeros_like(d) if p is None else p for d, p in zip(dummies, pushed, strict=True))


def replay(layer: Layer, call: LayerCall) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Calls the module again on leaves in place of its scored parameters; returns its outputs and those leaves."""
    leaves = {name: call.parameters[name].detach().requires_grad_() for name in layer.parameters}
    with _replaying(call), torch.enable_grad():
        output = functional_call(layer.module, {**call.parameters, **leaves}, call.args, call.kwargs)
    return tuple(o for o in tree_leaves(output) if isinstance(o, Tensor) and o.is_floating_point()), leaves


@contextmanager
def _replaying(call: LayerCall) -> Iterator[None]:
    """Replays a call with the random state and precision it first ran with, leaving the global ones as they were."""
    device = call.activations.device
    devices = [device] if device.type == "cuda" else []
    precision = torch.autocast(device.type, call.autocast, enabled=call.autocast is not None)
    with precision, torch.random.fork_rng(devices, enabled=call.rng_state is not None):
        if call.rng_state is not None:
            (torch.cuda.set_rng_state if devices else torch.random.set_rng_state)(call.rng_state)
        yield
