"""How each kind of layer turns one call (inputs and output gradients) into per-sample gradient figures.

The quantity wanted is ⟨g_n, G⟩ for sample gradients g_n and given targets G. With J the derivative of a layer's output
in its parameters, ⟨g_n, G⟩ = ⟨output_grads_n, J·G⟩: a directional derivative of the layer's *own forward*, dotted with
the gradients that backward delivers. That one rule is exact for any layer; the others are the same thing where a
closed form is cheaper. Rules are looked up by the identity of the forward function, never by `isinstance`: a subclass
that computes something else (a scaled embedding, a `1 + w` norm) must not inherit the closed form of its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from . import linear
from .samples import SampleLayout


Targets = dict[str, Tensor]  # parameter name -> [K, *parameter.shape]


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


class Rule:
    """Exact for any layer: directional derivatives of the module's own forward.

    Costs one forward of the layer, twice, per target. `known` silences the warning for layers where this is expected.
    """

    replays_forward = True  # the module is called again in backward, so its random state must be kept

    def __init__(self, known: bool = False):
        self.known = known

    def dots(self, layer: Layer, call: LayerCall, targets: Targets) -> list[Tensor]:
        """⟨g, G_k⟩ before summing over tokens: terms `[K, leading axes of an output]` whose sample sums add up."""
        terms: list[list[Tensor]] = []
        for k in range(len(next(iter(targets.values())))):
            tangents = directional_derivative(layer, call, {name: target[k] for name, target in targets.items()})
            terms.append(
                [
                    _sum_features(grad.to(_wide(grad)) * tangent.to(_wide(grad)))
                    for grad, tangent in zip(call.output_grads, tangents, strict=True)
                    if grad is not None
                ]
            )
        return [torch.stack(term) for term in zip(*terms, strict=True)]

    def sample_grads(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Iterator[dict[str, Tensor]]:
        """The gradient of each sample in turn, by parameter name. Backward is linear in the output gradients, so a
        sample's gradient is that of the call with everybody else's output gradients set to zero."""
        outputs, parameters = _replay(layer, call)
        used = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
        for n in range(layout.num_samples):
            result = torch.autograd.grad(
                [out for out, _ in used],
                list(parameters.values()),
                [(grad * layout.sample_mask(grad, n)).to(out.dtype) for out, grad in used],
                retain_graph=True,
                allow_unused=True,
            )
            yield {
                name: torch.zeros_like(parameter) if grad is None else grad
                for (name, parameter), grad in zip(parameters.items(), result, strict=True)
            }

    def sq_norms(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Tensor:
        """‖g_n‖² of every sample over the layer's scored parameters: `[num_samples]`."""
        norms = []
        for grads in self.sample_grads(layer, call, layout):
            norms.append(torch.stack([linear.flat_dot(g, g) for g in grads.values()]).sum())
        return torch.stack(norms)


class LinearRule(Rule):
    """`nn.Linear` (weight `[O, I]`) and, with `transposed`, transformers' `Conv1D` (weight `[I, O]`)."""

    replays_forward = False

    def __init__(self, transposed: bool = False):
        super().__init__(known=True)
        self.transposed = transposed

    def oriented(self, weight: Tensor) -> Tensor:
        """A weight, its gradient or target as `[..., O, I]`, or such a matrix as the weight is stored."""
        return weight.mT if self.transposed else weight

    def dots(self, layer: Layer, call: LayerCall, targets: Targets) -> list[Tensor]:
        terms = self.bias_dots(call.output_grad, targets)
        if "weight" in targets:
            weight = self.oriented(targets["weight"])
            terms.append(linear.token_dots(call.activations, call.output_grad, weight))
        return terms

    def bias_dots(self, output_grad: Tensor, targets: Targets) -> list[Tensor]:
        """The bias' share of :meth:`dots`, nothing where it is not scored."""
        if "bias" not in targets:
            return []
        dtype = linear.accumulation_dtype(output_grad.dtype)
        return [(output_grad.to(dtype) @ targets["bias"].to(dtype).mT).movedim(-1, 0)]

    def sample_grads(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Iterator[dict[str, Tensor]]:
        for a, g in _sample_tokens(call.activations, call.output_grad, layout):
            grads = {"weight": self.oriented(g.mT @ a), "bias": g.sum(0)}
            yield {name: grads[name] for name in layer.parameters}

    def sq_norms(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Tensor:
        norms = []
        for a, g in _sample_tokens(call.activations, call.output_grad, layout):
            norm = g.new_zeros((), dtype=linear.accumulation_dtype(g.dtype))
            if "weight" in layer.parameters:
                norm = norm + linear.sample_sq_norms(a[None], g[None])[0]
            if "bias" in layer.parameters:
                norm = norm + g.sum(0).square().sum()
            norms.append(norm)
        return torch.stack(norms)


class EmbeddingRule(Rule):
    """`nn.Embedding`: rows of the target gathered by token id, never a dense `[V, d]` per sample."""

    replays_forward = False

    def dots(self, layer: Layer, call: LayerCall, targets: Targets) -> list[Tensor]:
        ids, grad = _expand_ids(call)
        grad = grad.to(_wide(grad))
        gathered = (F.embedding(ids, target).to(grad.dtype) for target in targets["weight"])
        return [torch.stack([(rows * grad).sum(-1) for rows in gathered])]

    def sample_grads(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Iterator[dict[str, Tensor]]:
        ids, grad = _expand_ids(call)
        weight, padding = layer.parameters["weight"], _padding_idx(layer)
        for sample_ids, g in _sample_tokens(ids[..., None], grad, layout):
            dense = g.new_zeros(weight.shape).index_add_(0, sample_ids[:, 0].to(torch.long), g)
            if padding is not None:
                dense[padding] = 0
            yield {"weight": dense}

    def sq_norms(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Tensor:
        ids, grad = _expand_ids(call)
        padding, norms = _padding_idx(layer), []
        for sample_ids, g in _sample_tokens(ids[..., None], grad, layout):
            if padding is not None:
                g = g * (sample_ids != padding)
            unique, slots = torch.unique(sample_ids[:, 0], return_inverse=True)
            rows = g.new_zeros(len(unique), g.shape[-1]).index_add_(0, slots, g)
            norms.append(linear.flat_dot(rows, rows))
        return torch.stack(norms)


class ElementwiseRule(Rule):
    """Layers whose scored vectors act element by element on the last axis (norms): the derivative `∂y_d/∂w_d` of one
    replay of the forward gives dots, norms and gradients for any number of targets."""

    def _sensitivities(self, layer: Layer, call: LayerCall) -> dict[str, Tensor]:
        """`∂y/∂w · output_grad` per parameter, each shaped like the output."""
        grad = call.output_grad.to(_wide(call.output_grad))
        found = {}
        for name in layer.parameters:
            (tangent,) = directional_derivative(layer, call, {name: torch.ones_like(call.parameters[name])})
            found[name] = tangent.to(grad.dtype) * grad
        return found

    def dots(self, layer: Layer, call: LayerCall, targets: Targets) -> list[Tensor]:
        return [
            (sensitivity @ targets[name].to(sensitivity.dtype).mT).movedim(-1, 0)
            for name, sensitivity in self._sensitivities(layer, call).items()
        ]

    def sample_grads(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> Iterator[dict[str, Tensor]]:
        sensitivities = self._sensitivities(layer, call)
        for n in range(layout.num_samples):
            yield {name: _nth_sample(value, layout, n).sum(0) for name, value in sensitivities.items()}


class LayerNormRule(ElementwiseRule):
    """`nn.LayerNorm` over the last axis, in closed form."""

    replays_forward = False

    def _sensitivities(self, layer: Layer, call: LayerCall) -> dict[str, Tensor]:
        grad = call.output_grad.to(_wide(call.output_grad))
        found = {}
        if "weight" in layer.parameters:
            module = layer.module
            assert isinstance(module, nn.LayerNorm)
            normalized = F.layer_norm(call.activations.to(grad.dtype), module.normalized_shape, eps=module.eps)
            found["weight"] = normalized * grad
        if "bias" in layer.parameters:
            found["bias"] = grad
        return found


_RULES: dict[str, Callable[[], Rule]] = {
    "torch.nn.modules.linear.Linear.forward": LinearRule,
    "transformers.pytorch_utils.Conv1D.forward": lambda: LinearRule(transposed=True),
    "torch.nn.modules.sparse.Embedding.forward": lambda: EmbeddingRule(known=True),
    "torch.nn.modules.normalization.LayerNorm.forward": lambda: LayerNormRule(known=True),
    "torch.nn.modules.conv.Conv1d.forward": lambda: Rule(known=True),
    "torch.nn.modules.conv.Conv2d.forward": lambda: Rule(known=True),
    "torch.nn.modules.conv.Conv3d.forward": lambda: Rule(known=True),
    "peft.tuners.lora.dora.DoraLinearLayer.forward": lambda: Rule(known=True),
    "peft.tuners.lora.layer.Embedding.forward": lambda: Rule(known=True),
}


def register_rule(forward: Callable[..., Any], rule: Callable[[], Rule]) -> None:
    """Registers a rule for all modules whose class uses exactly this `forward` function.

    Args:
        forward: e.g. `MyLinear.forward`.
        rule: called without arguments, returns the :class:`Rule`.
    """
    _RULES[f"{forward.__module__}.{forward.__qualname__}"] = rule


def rule_for(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Rule:
    """The rule of a module: by its forward function, elementwise for norms with vectors only, else the general one."""
    forward = type(module).forward
    key = f"{forward.__module__}.{forward.__qualname__}"
    if "forward" not in module.__dict__ and key in _RULES:
        rule = _RULES[key]()
        if isinstance(module, nn.LayerNorm):
            covered = len(module.normalized_shape) == 1
        elif isinstance(module, nn.Embedding):
            covered = module.max_norm is None and not module.scale_grad_by_freq
        else:
            covered = True
        if covered:
            return rule
    if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and all(p.ndim == 1 for p in parameters.values()):
        return ElementwiseRule(known=True)
    return Rule()


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


def _replay(layer: Layer, call: LayerCall) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
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


def _sample_tokens(activations: Tensor, output_grads: Tensor, layout: SampleLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs `[S, I]` and output gradients `[S, O]` of the tokens of each sample in turn."""
    if not output_grads.is_floating_point() or activations.is_floating_point():
        activations = activations.to(output_grads.dtype)
    for n in range(layout.num_samples):
        yield _nth_sample(activations, layout, n), _nth_sample(output_grads, layout, n)


def _nth_sample(values: Tensor, layout: SampleLayout, n: int) -> Tensor:
    """Entries `[tokens, features]` of sample n in an activation `[rows, ..., features]`."""
    rows = layout.by_row(values)
    picked = rows[n] if layout.segments is None else rows[layout.segments == n]
    return picked.reshape(-1, values.shape[-1])


def _expand_ids(call: LayerCall) -> tuple[Tensor, Tensor]:
    """Token ids with the shape of the output gradients: positions shared by all rows stand once in the input."""
    grad = call.output_grad
    return call.activations.expand(grad.shape[:-1]), grad


def _padding_idx(layer: Layer) -> int | None:
    assert isinstance(layer.module, nn.Embedding)
    return layer.module.padding_idx


def _sum_features(values: Tensor) -> Tensor:
    """Sums an output-shaped tensor over all but its first two axes; a 2-D one is `[rows, features]`."""
    return values.flatten(min(2, values.ndim - 1)).sum(-1) if values.ndim > 1 else values


def _wide(tensor: Tensor) -> torch.dtype:
    return linear.accumulation_dtype(tensor.dtype)
