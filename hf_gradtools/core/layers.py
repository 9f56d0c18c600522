"""How each kind of layer turns one call (inputs and output gradients) into per-sample gradient figures.

The quantity wanted is ⟨g_n, G⟩ for sample gradients g_n and given targets G. With J the derivative of a layer's output
in its parameters, ⟨g_n, G⟩ = ⟨output_grads_n, J·G⟩: a directional derivative of the layer's *own forward*, dotted with
the gradients that backward delivers. That one rule is exact for any layer; the others are the same thing where a
closed form is cheaper. Rules are looked up by the identity of the forward function, never by `isinstance`: a subclass
that computes something else (a scaled embedding, a `1 + w` norm) must not inherit the closed form of its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear
from .calls import Layer, LayerCall, directional_derivative, replay
from .projection import Bases, project_matrix
from .samples import SampleLayout


Targets = dict[str, Tensor]  # parameter name -> [K, *parameter.shape]


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
        outputs, parameters = replay(layer, call)
        used = [(out, grad) for out, grad in zip(outputs, call.output_grads, strict=True) if grad is not None]
        for n in range(layout.num_samples):
            result = torch.autograd.grad(
                [out for out, _ in used],
                list(parameters.values()),
                [_shaped_as(out, (grad * layout.sample_mask(grad, n)).to(out.dtype)) for out, grad in used],
                retain_graph=True,
                allow_unused=True,
            )
            yield {
                name: torch.zeros_like(parameter) if grad is None else grad
                for (name, parameter), grad in zip(parameters.items(), result, strict=True)
            }

    def as_matrix(self, name: str, value: Tensor) -> Tensor:
        """A parameter's gradient (or the parameter) as a matrix `[O, I]`; a vector is `[d, 1]`."""
        return value.reshape(value.shape[0] if value.ndim else 1, -1)

    def project(
        self,
        layer: Layer,
        call: LayerCall,
        layout: SampleLayout,
        bases: Mapping[str, Bases],
        factors: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """`P_outᵀ g_n P_in` of every sample, by parameter name: `[num_samples, k_out, k_in]`.

        Args:
            layer, call, layout: what backward delivered.
            bases: of each of the layer's parameters, for its gradient as :meth:`as_matrix` gives it.
            factors: what each entry of a gradient is multiplied by first, shaped like the parameter. It takes the
                per-sample gradients themselves, one at a time, and no closed form.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in layer.parameters}
        for grads in self.sample_grads(layer, call, layout):
            for name, grad in grads.items():
                grad = grad.to(_wide(grad)) if factors is None else grad.to(_wide(grad)) * factors[name]
                found[name].append(project_matrix(self.as_matrix(name, grad), bases[name]))
        return {name: torch.stack(projected) for name, projected in found.items()}

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

    def as_matrix(self, name: str, value: Tensor) -> Tensor:
        return self.oriented(value) if name == "weight" else value[:, None]

    def project(
        self,
        layer: Layer,
        call: LayerCall,
        layout: SampleLayout,
        bases: Mapping[str, Bases],
        factors: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        if factors is not None:
            return super().project(layer, call, layout, bases, factors)
        grad = call.output_grad.to(_wide(call.output_grad))
        found = {}
        if "weight" in layer.parameters:
            out_basis, in_basis = bases["weight"]
            activations = call.activations.to(grad.dtype)
            found["weight"] = layout.outer_sums(_onto(grad, out_basis), _onto(activations, in_basis))
        if "bias" in layer.parameters:
            found["bias"] = _vector_sums(grad, bases["bias"], layout)
        return found

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

    def project(
        self,
        layer: Layer,
        call: LayerCall,
        layout: SampleLayout,
        bases: Mapping[str, Bases],
        factors: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        out_basis, in_basis = bases["weight"]
        weight = layer.parameters["weight"]
        if factors is not None:
            return super().project(layer, call, layout, bases, factors)
        ids, grad = _expand_ids(call)
        grad = grad.to(_wide(grad))
        if (padding := _padding_idx(layer)) is not None:
            grad = grad * (ids != padding)[..., None]
        if out_basis is None:  # a vocabulary no larger than its rank
            rows = F.one_hot(ids.long(), len(weight)).to(grad.dtype)
        else:
            rows = F.embedding(ids, out_basis).to(grad.dtype)
        return {"weight": layout.outer_sums(rows, _onto(grad, in_basis))}

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

    def project(
        self,
        layer: Layer,
        call: LayerCall,
        layout: SampleLayout,
        bases: Mapping[str, Bases],
        factors: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        found = self._sensitivities(layer, call)
        if factors is not None:
            found = {name: value * factors[name] for name, value in found.items()}
        return {name: _vector_sums(value, bases[name], layout) for name, value in found.items()}

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
    if not _computes_otherwise(module) and key in _RULES:
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


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether somebody has replaced the forward of this module alone; our takeovers and accelerate's hooks, which
    move weights and inputs between devices, compute the same as before."""
    patch = module.__dict__.get("forward")
    return patch is not None and not hasattr(module, "_hf_hook") and not hasattr(patch, "takes_over")


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


def _shaped_as(output: Tensor, grad: Tensor) -> Tensor:
    """Output gradients of all rows for an output that they share (the tap has given each row one)."""
    return grad if grad.shape == output.shape else grad.sum(0, keepdim=True)


def _onto(tokens: Tensor, basis: Tensor | None) -> Tensor:
    """Tokens `[..., d]` in terms of a basis `[d, k]`: `[..., k]`."""
    return tokens if basis is None else tokens @ basis.to(tokens.dtype)


def _vector_sums(values: Tensor, bases: Bases, layout: SampleLayout) -> Tensor:
    """A vector parameter's projected gradients `[num_samples, k_out, 1]` from its tokens' shares `[rows, ..., d]`."""
    projected = _onto(values, bases[0])
    return layout.outer_sums(projected, projected.new_ones(1).expand(*projected.shape[:-1], 1))


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
