"""Taps on the layers of a model: every call's inputs and output gradients, delivered while backward runs.

Two ways to be there, both leaving the forward's values as they are:

- a *tap*, an identity on the layer's output. Its input is kept by `save_for_backward`, so that activation
  checkpointing still frees and recomputes it, and autograd computes `.grad` exactly as without us;
- a *takeover* of a matrix product, whose backward is ours: the observer is handed inputs and output gradients and
  returns the weight gradient it has to form anyway.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .calls import Layer, LayerCall
from .layers import EmbeddingRule, LinearRule, rule_for


class Observer(Protocol):
    """Who is told of layer calls."""

    def rows(self) -> int | None:
        """Rows of the batch now in the model, None when nobody wants its layer calls."""

    def seen(self, layer: Layer) -> None:
        """The layer is being called (forward, or recomputed by checkpointing)."""

    def observe(self, layer: Layer, call: LayerCall) -> None:
        """Backward has reached the call."""

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        """Whether to hand this call's weight gradient to :meth:`take_over`."""

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        """Returns the weight's gradient from inputs `[rows, ..., I]` and output gradients `[rows, ..., O]`."""


class LayerCapture:
    """Installs taps on layers and removes them without a trace.

    Args:
        layers: from :func:`find_layers`.
        observer: told of every call while its `rows()` is not None.
        takeover: allow takeovers (never of a module whose forward somebody else has patched).
        frozen: also tap layers whose output needs no gradient, so that a model without trainable parameters runs
            backward, and only down to the first of these layers.
    """

    def __init__(self, layers: Sequence[Layer], observer: Observer, takeover: bool = False, frozen: bool = False):
        self.layers = layers
        self.observer = observer
        self.takeover = takeover
        self.frozen = frozen
        self._remove: list[Callable[[], Any]] = []
        self._taken_over: set[Layer] = set()  # between a layer's forward and its hook

    def attach(self) -> None:
        for layer in self.layers:
            if self.takeover and isinstance(layer.rule, LinearRule) and "forward" not in layer.module.__dict__:
                self._patch_forward(layer)
            hook = self._tap_hook(layer)
            self._remove.append(layer.module.register_forward_hook(hook, with_kwargs=True).remove)

    def detach(self) -> None:
        while self._remove:
            self._remove.pop()()

    def _patch_forward(self, layer: Layer) -> None:
        module, taken_over = layer.module, self._taken_over
        original: Callable[..., Tensor] = module.forward

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            observed = self.observer.rows() is not None and torch.is_grad_enabled()
            if not observed or not self.observer.wants_takeover(layer, x):
                taken_over.discard(layer)  # of a forward that failed half-way
                return original(*args, **kwargs)
            taken_over.add(layer)
            output: Tensor = _TakeoverProduct.apply(self.observer, layer, x, module.weight, module.bias)
            return output

        # Known to compute the same.
        forward.takes_over = True  # type: ignore[attr-defined]
        module.forward = forward
        self._remove.append(lambda: module.__dict__.pop("forward", None))

    def _tap_hook(self, layer: Layer) -> Callable[..., Any]:
        observer = self.observer

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            rows = observer.rows()
            if rows is None:
                return output
            observer.seen(layer)
            if not torch.is_grad_enabled():  # first pass of reentrant checkpointing: the recomputation is tapped
                return output
            if isinstance(output, Tensor):
                if layer in self._taken_over:
                    self._taken_over.discard(layer)
                    return output
                if isinstance(layer.rule, EmbeddingRule):
                    output = _one_row_per_sample(output, args, kwargs, rows)
                elif isinstance(layer.module, nn.Embedding) and output.ndim > 2 and output.shape[0] == 1:
                    output = output.expand(rows, *output.shape[1:])  # a position embedding with a forward of its own
            return tap(observer, layer, args, kwargs, _requiring_grad(output) if self.frozen else output)

        return hook


class Tap(torch.autograd.Function):
    """Identity on the first `num_outputs` tensors; backward shows their gradients and the saved rest to `deliver`."""

    @staticmethod
    def forward(ctx: Any, deliver: Callable[..., None], num_outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.deliver = deliver
        ctx.num_saved = len(tensors) - num_outputs
        ctx.save_for_backward(*tensors[num_outputs:])
        return tuple(_no_view(out) for out in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(grad is not None for grad in grads):
            with torch.no_grad():
                ctx.deliver(grads, ctx.saved_tensors)
        return None, None, *grads, *[None] * ctx.num_saved


def tap(observer: Observer, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    inputs, input_spec = tree_flatten((args, kwargs))
    outputs, output_spec = tree_flatten(output)
    tapped = [i for i, out in enumerate(outputs) if isinstance(out, Tensor) and out.is_floating_point()]
    if not any(outputs[i].requires_grad for i in tapped):
        return output
    saved = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    rng_state, parameters, autocast = None, {}, None
    if layer.rule.replays_forward:
        # As they are now: under FSDP2 the module holds the whole parameters during its own forward only.
        parameters = dict(layer.module.named_parameters())
        device = outputs[tapped[0]].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if layer.module.training and saved:
            on_cuda = inputs[saved[0]].is_cuda
            rng_state = torch.cuda.get_rng_state() if on_cuda else torch.random.get_rng_state()
    constants = [None if isinstance(value, Tensor) else value for value in inputs]

    def deliver(grads: tuple[Tensor | None, ...], tensors: tuple[Tensor, ...]) -> None:
        values = list(constants)
        tensors = tuple(tensor.detach() for tensor in tensors)
        for i, tensor in zip(saved, tensors[: len(saved)], strict=True):
            values[i] = tensor
        call_args, call_kwargs = tree_unflatten(values, input_spec)
        held = dict(zip(parameters, tensors[len(saved) :], strict=True))
        observer.observe(layer, LayerCall(call_args, call_kwargs, grads, held, rng_state, autocast))

    kept = [inputs[i] for i in saved] + [p.detach() for p in parameters.values()]
    results = Tap.apply(deliver, len(tapped), *[outputs[i] for i in tapped], *kept)
    for i, result in zip(tapped, results, strict=True):
        outputs[i] = result
    return tree_unflatten(outputs, output_spec)


class _TakeoverProduct(torch.autograd.Function):
    """`x Wᵀ + b` whose weight gradient the observer forms."""

    @staticmethod
    def forward(ctx: Any, observer: Observer, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.observer, ctx.layer = observer, layer
        ctx.save_for_backward(x, weight)
        rule = layer.rule
        assert isinstance(rule, LinearRule)
        bias = None if bias is None else bias.to(x.dtype)
        return _no_view(F.linear(x, rule.oriented(weight).to(x.dtype), bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rule, layer = ctx.layer.rule, ctx.layer
        x_grad = grad @ rule.oriented(weight).to(grad.dtype) if ctx.needs_input_grad[2] else None
        with torch.no_grad():
            weight_grad = ctx.observer.take_over(layer, x.detach(), grad).to(weight.dtype)
        bias_grad = grad.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[4] else None
        return None, None, x_grad, weight_grad, bias_grad


def _requiring_grad(output: Any) -> Any:
    """The same values, with what has no history made a leaf of its own."""

    def as_leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            return value.detach().requires_grad_()
        return value

    return tree_map(as_leaf, output)


def _no_view(tensor: Tensor) -> Tensor:
    """The same values as a tensor that autograd does not take for a view: in-place operations (`ReLU(inplace=True)`)
    on views made inside a custom function are forbidden."""
    alias: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias


def _one_row_per_sample(output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor:
    """Gives an embedding of shared positions (ids `[1, S]`, or `arange(S)`) a row per sample.

    Otherwise autograd sums its gradient over the samples before anybody can see their shares.
    """
    ids: Tensor = args[0] if args else kwargs["input"]
    if rows == 1:
        return output
    if ids.ndim >= 2 and ids.shape[0] == 1:
        return output.expand(rows, *output.shape[1:])
    if ids.ndim == 1 and torch.equal(ids, torch.arange(len(ids), device=ids.device)):
        return output.expand(rows, *output.shape)
    return output


def find_layers(model: nn.Module, patterns: str | Iterable[str] | None = None) -> list[Layer]:
    """The modules that own trainable parameters, with their rules.

    Args:
        model: searched by `named_modules`; frozen parameters are left out.
        patterns: None for all; "all-linear" for matrix products other than the output head (subclasses of `nn.Linear`
            included); else one or more regular expressions (or plain names) searched in the module names.

    Raises:
        ValueError: nothing is trainable, or a pattern matches no module with trainable parameters (near matches are
            named), or is no regular expression.
    """
    owners = {name: trainable for name, module in model.named_modules() if (trainable := _own_parameters(module))}
    for name in [name for name in owners if _used_by_parent(model, name)]:
        del owners[name]
    if not owners:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on what training updates")
    modules = dict(model.named_modules())
    layers = [Layer(name, modules[name], owners[name], rule_for(modules[name], owners[name])) for name in owners]
    if patterns is None:
        return layers
    if patterns == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # A head that shares its weight with the embeddings, too: its gradient is only whole together with theirs.
        embedded = {p for x in layers if isinstance(x.module, nn.Embedding) for p in x.parameters.values()}
        linear = [x for x in layers if isinstance(x.rule, LinearRule) or isinstance(x.module, nn.Linear)]
        return [x for x in linear if x.module is not head and not embedded & set(x.parameters.values())]
    chosen: dict[str, Layer] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            matches = [layer for layer in layers if re.search(pattern, layer.name)]
        except re.error as error:
            raise ValueError(f"layers={pattern!r} is no regular expression: {error}; correct it") from None
        if not matches:
            close = difflib.get_close_matches(pattern, owners, n=3, cutoff=0.3) or list(owners)[:3]
            raise ValueError(
                f"layers={pattern!r} matches no module with trainable parameters; near matches: {', '.join(close)}"
            )
        chosen.update((layer.name, layer) for layer in matches)
    # A parameter's gradient comes from all its uses: tied layers are scored together or not at all.
    parameters = {p for layer in chosen.values() for p in layer.parameters.values()}
    return [layer for layer in layers if parameters & set(layer.parameters.values())]


# Modules that use the parameters of their children without calling them, and children that are never called.
_WHOLE = (nn.MultiheadAttention,)
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters that the module's own forward uses, by name relative to it."""
    own = dict(module.named_parameters(recurse=isinstance(module, _WHOLE)))
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            own.update((f"{name}.{key}", p) for key, p in child.named_parameters())
    return {name: p for name, p in own.items() if p.requires_grad}


def _used_by_parent(model: nn.Module, name: str) -> bool:
    """Whether a module's parameters are listed with a module around it."""
    parents = [model.get_submodule(part) for part in _prefixes(name)]
    return isinstance(model.get_submodule(name), _CONTAINERS) or any(isinstance(p, _WHOLE) for p in parents)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))] if name else []
