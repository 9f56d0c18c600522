"""Per-sample gradient dot products of a training step: the engine under the callback, and usable in any loop.

```python
with GhostDotProd(model) as engine:
    for batch in loader:
        engine.validate(val_batches)          # gradient of the validation loss at these weights
        model(**batch).loss.backward()        # as ever; once or several times
        scores = engine.scores()              # before clipping and the optimizer's step
        optimizer.step(); optimizer.zero_grad()
```
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import linear
from ..core.capture import LayerCapture, find_layers
from ..core.distributed import all_reduce_sum, is_sharded, local_part, mean_over_ranks, to_local, world_size
from ..core.layers import Layer, LayerCall, LinearRule
from ..core.samples import SampleLayout
from .fused_head import fused_head_layer, install_fused_tap
from .validation import (
    Batch,
    LossFn,
    count_targets,
    hessian_vector_product,
    model_loss,
    total_targets,
    validation_gradient,
)


logger = logging.getLogger(__name__)

Method = Literal["auto", "takeover", "gram", "contraction"]
# Autograd rounds half-precision weight gradients to 8 bits or so; small layers do not average that away.
_HALF_PRECISION_SLACK = 30
METHODS: tuple[Method, ...] = ("auto", "takeover", "gram", "contraction")


class UncoveredGradientError(RuntimeError):
    """Part of the model's gradient is not in the per-sample values."""


@dataclass
class StepScores:
    """Figures of one optimizer step. M samples of all micro-batches in the order served, K targets, L layers.

    Attributes:
        dots: `[K, M]`, ⟨g_i, G_k⟩; their sum over M is ⟨p.grad, G_k⟩ of the unclipped accumulated gradient (over all
            ranks' M where there are several).
        layer_dots: `[L, K, M]`, the same by layer.
        sq_norms: `[M]`, ‖g_i‖², or None.
        token_dots: per micro-batch `[K, rows, S]`, or empty.
        target_norms: `[K]`, ‖G_k‖.
        residual: share of the values that the self-check could not account for; rounding when all is covered.
    """

    dots: Tensor
    layer_dots: Tensor
    sq_norms: Tensor | None
    token_dots: list[Tensor]
    target_norms: Tensor
    residual: float


@dataclass
class _MicroBatch:
    """What accumulates while one micro-batch runs backward."""

    layout: SampleLayout
    layer_dots: Tensor
    sq_norms: Tensor | None = None
    token_dots: Tensor | None = None
    calls: Counter[Layer] = field(default_factory=Counter)
    kept: list[tuple[Layer, LayerCall]] = field(default_factory=list)

    def add_sq_norms(self, sq_norms: Tensor) -> None:
        sq_norms = sq_norms.double()
        self.sq_norms = sq_norms if self.sq_norms is None else self.sq_norms + sq_norms


class GhostDotProd:
    """Scores every sample of a training step by the dot product of its gradient with a validation gradient.

    In-Run Data Shapley (Wang et al., ICLR 2025, arXiv 2406.11011), computed inside the ordinary backward pass.

    Args:
        model: any module; transformers models need nothing else.
        layers: what to score: None for every trainable parameter, "all-linear", or regular expressions of module
            names.
        method: "auto" picks per layer call; "contraction" and "gram" leave `.grad` to autograd, bit by bit;
            "takeover" forms it in the engine (equal to rounding).
        per_token: keep the dot product of every token.
        grad_norms: also compute ‖g_i‖.
        retain: keep inputs and output gradients of all layers until :meth:`release`, for :meth:`rescore`.
        keep_grads: keep a copy of the unclipped accumulated gradient, for :meth:`batch_gradient`.
        loss_fn: `loss_fn(model, batch)` gives the mean loss of a validation batch; default `model(**batch).loss`.
        shifts_labels: the model predicts the next token (weights validation batches by their targets).
        on_uncovered: "error" or "warn" when the self-check finds gradient that no layer's values account for.
        tolerance: relative size at which it does.
        starts_itself: a training-mode forward of the model starts a micro-batch; the callback starts its own.

    Raises:
        ValueError: unknown method, nothing trainable, a layer pattern without match, batch normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[str] | None = None,
        method: Method = "auto",
        per_token: bool = False,
        grad_norms: bool = False,
        retain: bool = False,
        keep_grads: bool = False,
        loss_fn: LossFn = model_loss,
        shifts_labels: bool = False,
        on_uncovered: Literal["error", "warn"] = "error",
        tolerance: float = 1e-3,
        starts_itself: bool = True,
    ):
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
        self.model = model
        found = find_layers(model, layers)
        # TRL's trainers never call the output head; they can only be in use once trl has been imported.
        self._fused = fused_head_layer(model, found) if "trl" in sys.modules else None
        self.layers = found if self._fused is None else [*found, self._fused]
        _refuse_batch_statistics(self.layers)
        _announce_general_rule(self.layers)
        self.parameters = list({p: None for layer in self.layers for p in layer.parameters.values()})
        self.method = method
        self.per_token, self.grad_norms = per_token, grad_norms
        self.retain, self.keep_grads = retain, keep_grads
        self.loss_fn, self.shifts_labels = loss_fn, shifts_labels
        self.on_uncovered, self.tolerance = on_uncovered, tolerance
        self.is_last_microbatch: Callable[[], bool] = lambda: True
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.on_failure: Callable[[], None] = self.detach

        self._groups = _groups(self.layers)
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self._alone = {layer for layer in self.layers if self._groups.count(self._groups[self._index[layer]]) == 1}
        self._targets: dict[nn.Parameter, Tensor] = {}
        self._num_targets = 0
        self._gram: dict[Layer, list[list[tuple[Tensor, Tensor]]]] = {}
        self._gram_target: int | None = None  # set while a validation pass is recorded
        self._last_shapes: dict[Layer, tuple[int, int]] = {}
        self._layout: SampleLayout | None = None
        self._in_forward = False
        self._suspended = False
        self._replaying = False
        self._microbatches: list[_MicroBatch] = []
        self._half = False  # half-precision gradients have been seen
        self._finished = False  # scores() has been called; the step's tensors stay until released
        self._check: dict[nn.Parameter, Tensor] = {}
        self._before: dict[nn.Parameter, Tensor] = {}
        self._kept_grads: dict[nn.Parameter, Tensor] = {}
        self._capture = LayerCapture(found, self, takeover=method in ("auto", "takeover") and not per_token)
        self._starts_itself = starts_itself
        self._handles: list[Any] = []

    # ---- life

    def attach(self) -> None:
        """Installs the hooks. Nothing happens in forward passes outside a micro-batch."""
        self._capture.attach()
        if self._fused is not None:
            self._handles.append(install_fused_tap(self.model, self._fused, self))
        self._handles += [p.register_post_accumulate_grad_hook(self._grad_hook) for p in self.parameters]
        self._handles.append(self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._forward_ends, always_call=True))

    def detach(self) -> None:
        """Removes every hook and patch from the model and forgets all tensors."""
        self._capture.detach()
        while self._handles:
            self._handles.pop().remove()
        self.release()
        self._targets, self._gram, self._layout = {}, {}, None

    def __enter__(self) -> GhostDotProd:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    # ---- targets

    def validate(
        self,
        batches: Mapping[str, Sequence[Batch]] | Sequence[Batch] | Batch,
        scale: Callable[[nn.Parameter], Tensor | float] | None = None,
        separately: bool = False,
    ) -> None:
        """Sets the validation gradients that the samples of the coming step are scored against.

        Args:
            batches: the validation batches (of this rank; together the ranks' batches are the validation set), or
                several named sets of them. Each set is one target. A single batch is taken as a list of one.
            scale: factor on a parameter's validation gradient, see :mod:`.optimizers`.
            separately: every batch is a target of its own, its share in the gradient of its set.

        Raises:
            ValueError: no batch, or none of their labels counts.
        """
        sets = _as_sets(batches)
        counted = [self._counted(chunks) for chunks in sets.values()]
        totals = [total_targets(chunks, self.parameters[0].device) for chunks in counted]
        if separately:
            totals = [total for chunks, total in zip(counted, totals, strict=True) for _ in chunks]
            counted = [[chunk] for chunks in counted for chunk in chunks]
        gradients = []
        record = self._gram_layers(scale)
        self._gram = {layer: [[] for _ in counted] for layer in record}
        for k, (chunks, total) in enumerate(zip(counted, totals, strict=True)):
            self._gram_target = k if record else None
            try:
                gradients.append(validation_gradient(self.model, self.parameters, chunks, self.loss_fn, total))
            finally:
                self._gram_target, self._layout = None, None
        if scale is not None:
            for p, *gradients_of_p in zip(self.parameters, *gradients, strict=True):
                factor = scale(p)
                for gradient in gradients_of_p:
                    gradient.mul_(factor)
        self.set_targets([dict(zip(self.parameters, gradient, strict=True)) for gradient in gradients])

    def set_targets(self, targets: Sequence[Mapping[nn.Parameter, Tensor]]) -> None:
        """Scores the coming step against these gradients, one mapping per target."""
        if len(targets) == 1:
            self._targets = {p: targets[0][p][None] for p in self.parameters}
        else:
            self._targets = {p: torch.stack([target[p] for target in targets]) for p in self.parameters}
        self._num_targets = len(targets)
        self.release()
        self._before = {p: self._against_targets(p) for p in self.parameters if p.grad is not None}

    def hessian_product(self, batches: Sequence[Batch], vector: Sequence[Tensor]) -> list[Tensor]:
        """H·u of the validation loss of `batches`, u and result as a tensor per entry of `parameters`."""
        return hessian_vector_product(self.model, self.parameters, self._counted(batches), self.loss_fn, vector)

    def _counted(self, batches: Sequence[Batch]) -> list[tuple[Batch, int]]:
        return [(batch, count_targets(batch, self.shifts_labels)) for batch in batches]

    # ---- a step

    def begin_microbatch(self, layout: SampleLayout) -> None:
        """The next training forward and its backward belong to these samples."""
        if not self._targets:
            return
        if self._finished:
            self.release()
        self._layout = layout
        reference = next(iter(self._targets.values()))
        dtype = linear.accumulation_dtype(reference.dtype)
        shape = (len(self.layers), self._num_targets, layout.num_samples)
        self._microbatches.append(_MicroBatch(layout, torch.zeros(shape, dtype=dtype, device=reference.device)))

    def scores(self) -> StepScores:
        """Ends the step: figures of all samples since :meth:`validate`. Call it before clipping or `optimizer.step`.

        Raises:
            UncoveredGradientError: the self-check failed and `on_uncovered="error"`.
            RuntimeError: nothing was scored.
        """
        if not self._microbatches:
            raise RuntimeError("no training forward since validate(): call engine.validate(...) before model(...)")
        self._layout = None
        if self.grad_norms:
            for microbatch in self._microbatches:
                self._norms_of_shared(microbatch)
        raw = torch.cat([m.layer_dots for m in self._microbatches], dim=2).double()
        residual = self._residual(raw)
        share = 1 / (self.loss_scale() * world_size())
        norms = [m.sq_norms for m in self._microbatches if m.sq_norms is not None]
        target_sq = torch.zeros(self._num_targets, dtype=torch.float64, device=raw.device)
        for target in self._targets.values():
            target_sq += torch.stack([linear.flat_dot(t, t) for t in target])
        layer_dots = (raw * share).cpu()
        scores = StepScores(
            dots=layer_dots.sum(0),
            layer_dots=layer_dots,
            sq_norms=torch.cat(norms).double().cpu() * share**2 if norms else None,
            token_dots=[m.token_dots.double().cpu() * share for m in self._microbatches if m.token_dots is not None],
            target_norms=target_sq.sqrt().cpu(),
            residual=residual,
        )
        self._finished = True
        if not self.retain:
            for microbatch in self._microbatches:
                microbatch.kept.clear()
        return scores

    def rescore(self, target: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """⟨g_i, target⟩ by layer of the samples of the step that :meth:`scores` ended, `[L, M]`.

        Needs `retain=True`; the step's tensors are there until :meth:`release`.
        """
        values = []
        for microbatch in self._microbatches:
            dots = torch.zeros(len(self.layers), microbatch.layout.num_samples, dtype=torch.float64)
            for layer, call in microbatch.kept:
                targets = {name: target[p][None] for name, p in layer.parameters.items()}
                for term in layer.rule.dots(layer, call, targets):
                    dots[self._index[layer]] += microbatch.layout.sum_samples(term)[0].double().cpu()
            values.append(dots / (self.loss_scale() * world_size()))
        return torch.cat(values, dim=1)

    def rescored(self, scores: StepScores, targets: Sequence[Mapping[nn.Parameter, Tensor]]) -> StepScores:
        """The same samples' figures against other targets."""
        layer_dots = torch.stack([self.rescore(target) for target in targets], dim=1)
        norms = [sum(linear.flat_dot(t, t) for t in target.values()) for target in targets]
        return replace(scores, layer_dots=layer_dots, dots=layer_dots.sum(0), target_norms=torch.stack(norms).sqrt().cpu())

    def target(self, parameter: nn.Parameter) -> Tensor:
        """What the parameter's gradient is scored against, `[K, *shape]`."""
        return self._targets[parameter]

    def batch_gradient(self) -> dict[nn.Parameter, Tensor]:
        """The step's unclipped accumulated gradient, averaged over ranks; needs `keep_grads=True`."""
        grads = {p: self._kept_grads.get(p, torch.zeros_like(p)) for p in self.parameters}
        mean_over_ranks(grads.values())
        return {p: grad / self.loss_scale() for p, grad in grads.items()}

    def clip_coefficient(self) -> float:
        """What the gradient was multiplied by between backward and now; call it after clipping, before the step."""
        checked = [p for p in self.parameters if p in self._check]
        raw = torch.stack([self._check[p] for p in checked])
        now = torch.stack([self._against_targets(p) for p in checked])
        mean_over_ranks([raw])
        size = raw.abs().sum()
        return float((raw.sign() * now).sum() / size) if size > 0 else 1.0

    def release(self) -> None:
        """Forgets the step's tensors (the next step does it too)."""
        self._finished = False
        self._microbatches, self._check, self._before, self._kept_grads = [], {}, {}, {}

    # ---- hooks of the model

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._replaying:  # the model is itself a layer
            return
        trains = module.training and torch.is_grad_enabled()
        if self._gram_target is not None:
            self._layout = infer_layout(args, kwargs)
        elif trains and self._starts_itself:
            self.begin_microbatch(infer_layout(args, kwargs))
        # An evaluation between forward and backward (TRL makes one for its metrics) is not part of the step.
        self._suspended = not trains and self._gram_target is None
        self._in_forward = trains

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._replaying:
            self._in_forward = self._suspended = False

    def _grad_hook(self, parameter: nn.Parameter) -> None:
        if self._microbatches and self.is_last_microbatch():
            self._check[parameter] = self._against_targets(parameter)
            if self.keep_grads:
                assert parameter.grad is not None
                self._kept_grads[parameter] = parameter.grad.detach().clone()

    def _against_targets(self, parameter: nn.Parameter) -> Tensor:
        """⟨p.grad, G_k⟩, `[K]`; of this rank's part where the parameter is sharded."""
        assert parameter.grad is not None
        grad = to_local(parameter.grad)
        return torch.stack([linear.flat_dot(grad, local_part(t, parameter)) for t in self._targets[parameter]])

    # ---- Observer of the layers

    def rows(self) -> int | None:
        return None if self._layout is None or self._suspended or self._replaying else self._layout.rows

    def seen(self, layer: Layer) -> None:
        if self._in_forward and self._microbatches:
            self._microbatches[-1].calls[layer] += 1

    def observe(self, layer: Layer, call: LayerCall) -> None:
        if self._gram_target is not None:
            if layer in self._gram:
                tokens = call.activations.flatten(0, -2), call.output_grad.flatten(0, -2)
                self._gram[layer][self._gram_target].append(tokens)
            return
        self._half |= any(g is not None and g.element_size() < 4 for g in call.output_grads)
        self._replaying = True  # calls of layers from in here are not the model's
        try:
            for term in self._terms(layer, call):
                self._add(layer, term)
            microbatch = self._microbatches[-1]
            if self.grad_norms and not self._is_shared(layer, microbatch):
                microbatch.add_sq_norms(layer.rule.sq_norms(layer, call, microbatch.layout))
            self._keep(layer, call)
        except BaseException:
            self.on_failure()  # the exception leaves through the user's backward(), where nobody cleans up
            raise
        finally:
            self._replaying = False

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        if "weight" not in layer.parameters or self._layout is None or self._layout.segments is not None:
            return False
        if self._gram_target is not None or activations.ndim < 2 or activations.shape[0] != self._layout.rows:
            return False
        if activations.requires_grad is False and not layer.module.weight.requires_grad:
            return False
        # In half precision only takeover sums the weight gradient in float32, and sees the pieces it is made of.
        half = activations.element_size() < 4 or torch.is_autocast_enabled(activations.device.type)
        return half or self.method == "takeover" or self._cheapest(layer, activations) == "takeover"

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        rule = layer.rule
        assert isinstance(rule, LinearRule)
        targets = self._targets_of(layer)
        self._half |= output_grads.element_size() < 4
        samples = activations.shape[0]
        a = activations.reshape(samples, -1, activations.shape[-1])
        g = output_grads.reshape(samples, -1, output_grads.shape[-1])
        norms_here = self.grad_norms and not self._is_shared(layer, self._microbatches[-1])
        weight_grad, dots, sq_norms = linear.takeover(a, g, rule.oriented(targets["weight"]), norms_here)
        for term in [dots, *rule.bias_dots(output_grads, targets)]:
            self._add(layer, term)
        if sq_norms is not None:
            if "bias" in targets:
                sq_norms = sq_norms + g.sum(1, dtype=sq_norms.dtype).square().sum(-1)
            self._microbatches[-1].add_sq_norms(sq_norms)
        self._keep(layer, LayerCall((activations,), {}, (output_grads,)))
        return weight_grad

    # ---- figures of a call

    def _targets_of(self, layer: Layer) -> dict[str, Tensor]:
        return {name: self._targets[p] for name, p in layer.parameters.items()}

    def _terms(self, layer: Layer, call: LayerCall) -> list[Tensor]:
        targets = self._targets_of(layer)
        rule, others = layer.rule, self._gram.get(layer)
        if isinstance(rule, LinearRule) and "weight" in targets:
            self._last_shapes[layer] = (call.activations.shape[0], call.activations[0, ..., 0].numel())
            if others and (self.method == "gram" or self._cheapest(layer, call.activations) == "gram"):
                a, g = call.activations, call.output_grad
                dots = [sum(linear.gram_token_dots(a, g, chunk) for chunk in chunks) for chunks in others]
                return [torch.stack(dots), *rule.bias_dots(g, targets)]
        return rule.dots(layer, call, targets)

    def _add(self, layer: Layer, term: Tensor) -> None:
        microbatch = self._microbatches[-1]
        try:
            microbatch.layer_dots[self._index[layer]] += microbatch.layout.sum_samples(term)
            if self.per_token:
                tokens = microbatch.layout.token_values(term)
                microbatch.token_dots = tokens if microbatch.token_dots is None else microbatch.token_dots + tokens
        except ValueError as error:
            raise ValueError(
                f"layer {layer.name!r}: {error}. Leave it out by layers=[...] or freeze its parameters."
            ) from None

    def _is_shared(self, layer: Layer, microbatch: _MicroBatch) -> bool:
        """Whether the layer's parameters have other uses in this forward, whose gradients add up before squaring."""
        return layer not in self._alone or microbatch.calls[layer] > 1

    def _keep(self, layer: Layer, call: LayerCall) -> None:
        if self.retain or (self.grad_norms and self._is_shared(layer, self._microbatches[-1])):
            self._microbatches[-1].kept.append((layer, call))

    def _norms_of_shared(self, microbatch: _MicroBatch) -> None:
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

    def _cheapest(self, layer: Layer, activations: Tensor) -> str:
        others = self._gram.get(layer)
        held = sum(len(a) for chunks in others for a, _ in chunks) if others else None
        outputs, inputs = self._oriented_shape(layer)
        tokens = activations[0, ..., 0].numel()
        return linear.cheapest_way(activations.shape[0], tokens, inputs, outputs, self._num_targets, held)

    def _oriented_shape(self, layer: Layer) -> tuple[int, int]:
        rule = layer.rule
        assert isinstance(rule, LinearRule)
        outputs, inputs = rule.oriented(layer.parameters["weight"]).shape
        return outputs, inputs

    def _gram_layers(self, scale: object) -> list[Layer]:
        """Layers whose validation activations are worth recording: raw targets, an unshared weight, one process."""
        if self.method not in ("auto", "gram") or scale is not None or self._num_targets_unknown():
            return []
        linears = [x for x in self.layers if isinstance(x.rule, LinearRule) and "weight" in x.parameters]
        linears = [x for x in linears if x in self._alone]
        if self.method == "gram":
            return linears
        return [x for x in linears if x in self._last_shapes and self._gram_pays(x)]

    def _num_targets_unknown(self) -> bool:
        return world_size() > 1

    def _gram_pays(self, layer: Layer) -> bool:
        samples, tokens = self._last_shapes[layer]
        outputs, inputs = self._oriented_shape(layer)
        # The validation batch is taken to be as long as the last training rows; the true size decides at the call.
        return linear.cheapest_way(samples, tokens, inputs, outputs, 1, tokens) == "gram"

    # ---- self-check

    def _residual(self, raw: Tensor) -> float:
        """Compares ⟨p.grad, G⟩ with the summed values, by group of layers that share parameters.

        Returns the unaccounted share of all values; raises or warns when a whole group's share is missing.
        """
        groups = sorted(set(self._groups))
        observed = raw.new_zeros(len(groups), 3, self._num_targets)  # gradient's value, summed values, their size
        for g, group in enumerate(groups):
            members = [i for i, other in enumerate(self._groups) if other == group]
            for p in {p: None for i in members for p in self.layers[i].parameters.values()}:
                if p in self._check:
                    observed[g, 0] += self._check[p] - self._before.get(p, 0.0)
            values = raw[members].sum(0)
            observed[g, 1] = values.sum(-1)
            observed[g, 2] = values.abs().sum(-1)
        if any(is_sharded(p) for p in self.parameters):  # FSDP2 hands out the mean over ranks, in parts
            observed[:, 1:] /= world_size()
            all_reduce_sum([observed])
        gap = (observed[:, 0] - observed[:, 1]).abs()
        scale = torch.maximum(observed[:, 0].abs(), observed[:, 2])
        total = scale.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        residual = float((gap.sum(0) / total).max())
        # A group must be off by its own measure and matter: rounding alone can exceed the one in a layer whose
        # gradient is all but orthogonal to the validation gradient.
        tolerance = self.tolerance * (_HALF_PRECISION_SLACK if self._half else 1)
        missing = (gap > tolerance * scale) & (gap > 1e-2 * tolerance * total)
        if bool(missing.any()):
            self._report_uncovered([groups[g] for g in missing.any(1).nonzero().flatten().tolist()], residual)
        return residual

    def _report_uncovered(self, groups: list[int], residual: float) -> None:
        names = [layer.name for layer, group in zip(self.layers, self._groups, strict=True) if group in groups]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        message = (
            f"the gradient of {listed} is not explained by the per-sample values (unaccounted share {residual:.1e}): "
            "the parameters are used outside their module's forward. Leave these layers out by layers=[...], register "
            "a rule with hf_gradtools.core.layers.register_rule, or pass on_uncovered='warn'."
        )
        if self.on_uncovered == "error":
            raise UncoveredGradientError(message)
        logger.warning(message)


def infer_layout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SampleLayout:
    """Rows, sequence lengths and packed segments of a model call.

    Rows are packed when `position_ids` start again inside a row and no attention mask says otherwise, as flattening
    (padding-free) collators make them.

    Raises:
        ValueError: no tensor among the arguments.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 0]
    if not tensors:
        raise ValueError("the model was called without a tensor, so the number of samples is unknown")
    first = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), tensors[0])
    named = [kwargs.get(k) for k in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels")]
    lengths = {x.shape[1] for x in [*named, first] if isinstance(x, Tensor) and x.ndim > 1}
    rows, segments, count = first.shape[0], None, 0
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2 and kwargs.get("attention_mask") is None:
        starts = positions == 0
        starts[:, 0] = True
        count = int(starts.sum())
        if count > rows and positions.shape[0] == rows:
            segments = (starts.flatten().cumsum(0) - 1).view(positions.shape)
    return SampleLayout(rows, tuple(sorted(lengths)), segments, count)


def _as_sets(batches: Any) -> dict[str, Sequence[Batch]]:
    if isinstance(batches, Mapping) and all(isinstance(value, (list, tuple)) for value in batches.values()):
        sets = dict(batches)
    elif isinstance(batches, list):
        sets = {"validation": batches}
    else:
        sets = {"validation": [batches]}
    if not sets or not all(len(chunks) for chunks in sets.values()):
        raise ValueError("validate() got an empty validation set; pass at least one batch for every set")
    return sets


def _groups(layers: Sequence[Layer]) -> list[int]:
    """For each layer the first layer that it shares a parameter with, directly or through others."""
    group = list(range(len(layers)))
    owner: dict[nn.Parameter, int] = {}
    for i, layer in enumerate(layers):
        for p in layer.parameters.values():
            j = group[owner.setdefault(p, i)]
            low, high = sorted((group[i], j))
            group = [low if g == high else g for g in group]
    return group


def _refuse_batch_statistics(layers: Sequence[Layer]) -> None:
    mixing = [layer.name for layer in layers if isinstance(layer.module, nn.modules.batchnorm._BatchNorm)]
    if mixing:
        raise ValueError(
            f"{', '.join(mixing[:5])}: batch normalisation mixes the samples of a batch, so per-sample gradients do not "
            "exist; freeze these layers' parameters or leave them out by layers=[...]"
        )


def _announce_general_rule(layers: Sequence[Layer]) -> None:
    kinds = sorted({type(layer.module).__name__ for layer in layers if not layer.rule.known})
    if kinds:
        logger.warning(
            "no closed form for %s: their forward is replayed along the validation gradient, which is exact and slower",
            ", ".join(kinds),
        )
