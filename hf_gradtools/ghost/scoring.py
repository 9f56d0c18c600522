"""What is computed when backward reaches a layer: each sample's share of the dot products, by the cheapest way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core import linear
from ..core.calls import Layer, LayerCall
from ..core.layers import LinearRule
from ..core.samples import SampleLayout
from .coverage import parameter_groups


Method = Literal["auto", "takeover", "gram", "contraction"]
METHODS: tuple[Method, ...] = ("auto", "takeover", "gram", "contraction")


@dataclass
class MicroBatch:
    """What accumulates while one micro-batch of M samples runs backward, for K targets and L layers.

    Attributes:
        layout: how the samples lie in it.
        layer_dots: `[L, K, M]`.
        sq_norms: `[M]`, once anything was added.
        token_dots: `[K, rows, S]`, once anything was added.
        calls: how often each layer was called in the forward.
        kept: calls that are needed again at the end of the step.
    """

    layout: SampleLayout
    layer_dots: Tensor
    sq_norms: Tensor | None = None
    token_dots: Tensor | None = None
    calls: Counter[Layer] = field(default_factory=Counter)
    kept: list[tuple[Layer, LayerCall]] = field(default_factory=list)

    def add_sq_norms(self, sq_norms: Tensor) -> None:
        sq_norms = sq_norms.double()
        self.sq_norms = sq_norms if self.sq_norms is None else self.sq_norms + sq_norms


class LayerScorer:
    """The observer of the layers: adds what it finds to the current micro-batch.

    Args:
        layers: the scored layers.
        method: see :class:`~.engine.GhostDotProd`; so are `per_token`, `grad_norms` and `retain`.
        on_failure: called before an exception leaves through the user's `backward()`, where nobody cleans up.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        method: Method,
        per_token: bool,
        grad_norms: bool,
        retain: bool,
        on_failure: Callable[[], None],
    ):
        self.layers, self.method = layers, method
        self.per_token, self.grad_norms, self.retain = per_token, grad_norms, retain
        self.on_failure = on_failure
        self.targets: dict[nn.Parameter, Tensor] = {}
        self.num_targets = 0
        self.microbatches: list[MicroBatch] = []
        self.layout: SampleLayout | None = None  # of the batch in the model, None when nobody wants its calls
        self.in_forward = False
        self.suspended = False  # a forward that is not part of the step is running
        self.replaying = False  # a layer is being called again from inside a rule
        self.half_precision = False  # half-precision gradients have been seen
        self.index = {layer: i for i, layer in enumerate(layers)}
        groups = parameter_groups(layers)
        self._alone = {layer for i, layer in enumerate(layers) if groups.count(groups[i]) == 1}
        self._recorded: dict[Layer, list[list[tuple[Tensor, Tensor]]]] = {}
        self._recording: int | None = None
        self._shapes: dict[Layer, tuple[int, int]] = {}  # rows and tokens of the last training call

    # ---- the validation pass, for the Gram way

    def layers_to_record(self) -> list[Layer]:
        """Layers whose validation tokens will be worth having: those that own their weight alone (tied ones have
        cross terms) and, under "auto", that were called with sizes for which the Gram way pays."""
        if self.method not in ("auto", "gram"):
            return []
        candidates = [x for x in self.layers if x in self._alone and isinstance(x.rule, LinearRule)]
        candidates = [x for x in candidates if "weight" in x.parameters]
        return candidates if self.method == "gram" else [x for x in candidates if self._gram_pays(x)]

    def start_recording(self, layers: Sequence[Layer], num_targets: int) -> None:
        """Forgets old recordings; the validation tokens of these layers are wanted."""
        self._recorded = {layer: [[] for _ in range(num_targets)] for layer in layers}

    def record_target(self, target: int | None) -> None:
        """Layer calls from here on are of the validation pass of this target; None ends it."""
        self._recording = target if self._recorded else None
        if target is None:
            self.layout = None

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    # ---- Observer

    def rows(self) -> int | None:
        return None if self.layout is None or self.suspended or self.replaying else self.layout.rows

    def seen(self, layer: Layer) -> None:
        if self.in_forward and self.microbatches:
            self.microbatches[-1].calls[layer] += 1

    def observe(self, layer: Layer, call: LayerCall) -> None:
        if self._recording is not None:
            if layer in self._recorded:
                tokens = call.activations.flatten(0, -2), call.output_grad.flatten(0, -2)
                self._recorded[layer][self._recording].append(tokens)
            return
        self.half_precision |= any(g is not None and g.element_size() < 4 for g in call.output_grads)
        self.replaying = True
        try:
            microbatch = self.microbatches[-1]
            for term in self._terms(layer, call):
                self._add(microbatch, layer, term)
            if self.grad_norms and not self._is_shared(layer, microbatch):
                microbatch.add_sq_norms(layer.rule.sq_norms(layer, call, microbatch.layout))
            self._keep(microbatch, layer, call)
        except BaseException:
            self.on_failure()
            raise
        finally:
            self.replaying = False

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        if self._recording is not None or "weight" not in layer.parameters or self.layout is None:
            return False
        if self.layout.segments is not None or activations.ndim < 2 or activations.shape[0] != self.layout.rows:
            return False
        # In half precision only takeover sums the weight gradient in float32, and sees the pieces it is made of.
        half = activations.element_size() < 4 or torch.is_autocast_enabled(activations.device.type)
        return half or self.method == "takeover" or self._cheapest(layer, activations) == "takeover"

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        rule, microbatch = layer.rule, self.microbatches[-1]
        assert isinstance(rule, LinearRule)
        self.half_precision |= output_grads.element_size() < 4
        targets, samples = self._targets_of(layer), activations.shape[0]
        a = activations.reshape(samples, -1, activations.shape[-1])
        g = output_grads.reshape(samples, -1, output_grads.shape[-1])
        wants_norms = self.grad_norms and not self._is_shared(layer, microbatch)
        # In the weight's own layout, so that autograd takes the result as it is: Conv1D's weight is [I, O].
        pair = (g, a) if rule.transposed else (a, g)
        weight_grad, dots, sq_norms = linear.takeover(*pair, targets["weight"], wants_norms)
        for term in [dots, *rule.bias_dots(output_grads, targets)]:
            self._add(microbatch, layer, term)
        if sq_norms is not None:
            if "bias" in targets:
                sq_norms = sq_norms + g.sum(1, dtype=sq_norms.dtype).square().sum(-1)
            microbatch.add_sq_norms(sq_norms)
        self._keep(microbatch, layer, LayerCall((activations,), {}, (output_grads,)))
        return weight_grad

    # ---- figures

    def _targets_of(self, layer: Layer) -> dict[str, Tensor]:
        return {name: self.targets[p] for name, p in layer.parameters.items()}

    def _terms(self, layer: Layer, call: LayerCall) -> list[Tensor]:
        targets, rule, others = self._targets_of(layer), layer.rule, self._recorded.get(layer)
        if others and isinstance(rule, LinearRule):
            a, g = call.activations, call.output_grad
            if self.method == "gram" or self._cheapest(layer, a) == "gram":
                dots = [sum(linear.gram_token_dots(a, g, chunk) for chunk in chunks) for chunks in others]
                return [torch.stack(dots), *rule.bias_dots(g, targets)]
        return rule.dots(layer, call, targets)

    def _add(self, microbatch: MicroBatch, layer: Layer, term: Tensor) -> None:
        try:
            microbatch.layer_dots[self.index[layer]] += microbatch.layout.sum_samples(term)
            if self.per_token:
                tokens = microbatch.layout.token_values(term)
                microbatch.token_dots = tokens if microbatch.token_dots is None else microbatch.token_dots + tokens
        except ValueError as error:
            raise ValueError(
                f"layer {layer.name!r}: {error}. Leave it out by layers=[...] or freeze its parameters."
            ) from None

    def _is_shared(self, layer: Layer, microbatch: MicroBatch) -> bool:
        """Whether the layer's parameters have other uses in this forward, whose gradients add up before squaring."""
        return layer not in self._alone or microbatch.calls[layer] > 1

    def _keep(self, microbatch: MicroBatch, layer: Layer, call: LayerCall) -> None:
        if self.retain or (self.grad_norms and self._is_shared(layer, microbatch)):
            microbatch.kept.append((layer, call))

    def add_shared_norms(self, microbatch: MicroBatch) -> None:
        """Norms of parameters with several uses in a forward: the gradients of the uses add up before squaring."""
        uses: dict[nn.Parameter, list[tuple[str, Layer, LayerCall]]] = {}
        for layer, call in microbatch.kept:
            if self._is_shared(layer, microbatch):
                for name, parameter in layer.parameters.items():
                    uses.setdefault(parameter, []).append((name, layer, call))
        for found in uses.values():
            samples = [layer.rule.sample_grads(layer, call, microbatch.layout) for _, layer, call in found]
            norms = []
            for grads in zip(*samples, strict=True):
                total = sum(grad[name].double() for grad, (name, _, _) in zip(grads, found, strict=True))
                norms.append(linear.flat_dot(total, total))
            microbatch.add_sq_norms(torch.stack(norms))

    # ---- which way

    def _cheapest(self, layer: Layer, activations: Tensor) -> str:
        self._shapes[layer] = rows, tokens = activations.shape[0], math.prod(activations.shape[1:-1])
        others = self._recorded.get(layer)
        held = sum(len(a) for chunks in others for a, _ in chunks) if others else None
        outputs, inputs = _oriented_shape(layer)
        return linear.cheapest_way(rows, tokens, inputs, outputs, self.num_targets, held)

    def _gram_pays(self, layer: Layer) -> bool:
        """Whether it would for a validation sample as long as the last training rows; its true size decides later."""
        if layer not in self._shapes:
            return False
        rows, tokens = self._shapes[layer]
        outputs, inputs = _oriented_shape(layer)
        return linear.cheapest_way(rows, tokens, inputs, outputs, 1, tokens) == "gram"


def _oriented_shape(layer: Layer) -> tuple[int, int]:
    rule = layer.rule
    assert isinstance(rule, LinearRule)
    outputs, inputs = rule.oriented(layer.parameters["weight"]).shape
    return outputs, inputs
