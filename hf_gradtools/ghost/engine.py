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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core import linear
from ..core.calls import Layer
from ..core.capture import LayerCapture, find_layers
from ..core.distributed import mean_over_ranks, world_size
from ..core.samples import SampleLayout
from .coverage import SelfCheck, refuse_batch_statistics
from .fused_head import fused_head_layer, install_fused_tap
from .layout import infer_layout
from .scoring import METHODS, LayerScorer, Method, MicroBatch
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


@dataclass
class StepScores:
    """Figures of one optimizer step. M samples of all micro-batches in the order served, K targets, L layers.

    Attributes:
        dots: `[K, M]`, ⟨g_i, G_k⟩; their sum over M is ⟨p.grad, G_k⟩ of the unclipped accumulated gradient (over all
            ranks' M where there are several).
        layer_dots: `[L, K, M]`, the same by layer.
        sq_norms: `[M]`, ‖g_i‖², or None.
        token_dots: per micro-batch `[K, rows, S]`, or empty.
        target_norms: `[K]`, ‖G_k‖, or None; with the squared norms.
        residual: share of the values that the self-check could not account for; rounding when all is covered.
    """

    dots: Tensor
    layer_dots: Tensor
    sq_norms: Tensor | None
    token_dots: list[Tensor]
    target_norms: Tensor | None
    residual: float


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
        refuse_batch_statistics(self.layers)
        _announce_general_rule(self.layers)
        self.parameters = list({p: None for layer in self.layers for p in layer.parameters.values()})
        self.grad_norms, self.retain, self.keep_grads = grad_norms, retain, keep_grads
        self.loss_fn, self.shifts_labels = loss_fn, shifts_labels
        self.check = SelfCheck(self.layers, on_uncovered, tolerance)
        self.is_last_microbatch: Callable[[], bool] = lambda: True
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.on_failure: Callable[[], None] = self.detach

        self._scorer = LayerScorer(self.layers, method, per_token, grad_norms, retain, lambda: self.on_failure())
        self._finished = False  # scores() has been called; the step's tensors stay until released
        self._kept_grads: dict[nn.Parameter, Tensor] = {}
        self._capture = LayerCapture(found, self._scorer, takeover=method in ("auto", "takeover") and not per_token)
        self._starts_itself = starts_itself
        self._handles: list[Any] = []

    # ---- life

    def attach(self) -> None:
        """Installs the hooks. Nothing happens in forward passes outside a micro-batch."""
        self._capture.attach()
        if self._fused is not None:
            self._handles.append(install_fused_tap(self.model, self._fused, self._scorer))
        self._handles += [p.register_post_accumulate_grad_hook(self._grad_hook) for p in self.parameters]
        self._handles.append(self.model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._forward_ends, always_call=True))

    def detach(self) -> None:
        """Removes every hook and patch from the model and forgets all tensors."""
        self._capture.detach()
        while self._handles:
            self._handles.pop().remove()
        self.release()
        self._scorer.targets, self._scorer.layout = {}, None
        self._scorer.start_recording([], 0)

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
        self.release()
        self._scorer.targets = {}  # let go before the new ones are made
        self.check.start({})
        counted = [self._counted(chunks) for chunks in sets.values()]
        totals = [total_targets(chunks, self.parameters[0].device) for chunks in counted]
        if separately:
            totals = [total for chunks, total in zip(counted, totals, strict=True) for _ in chunks]
            counted = [[chunk] for chunks in counted for chunk in chunks]
        # Scaling a gradient element by element leaves no Gram form, and other ranks' validation tokens are not here.
        wanted = self._scorer.layers_to_record() if scale is None and world_size() == 1 else []
        self._scorer.start_recording(wanted, len(counted))
        gradients = []
        for k, (chunks, total) in enumerate(zip(counted, totals, strict=True)):
            self._scorer.record_target(k)
            try:
                gradients.append(validation_gradient(self.model, self.parameters, chunks, self.loss_fn, total))
            finally:
                self._scorer.record_target(None)
        if scale is not None:
            for i, p in enumerate(self.parameters):
                factor = scale(p)
                for gradient in gradients:
                    gradient[i] = gradient[i] * factor
        self.set_targets([dict(zip(self.parameters, gradient, strict=True)) for gradient in gradients])

    def set_targets(self, targets: Sequence[Mapping[nn.Parameter, Tensor]]) -> None:
        """Scores the coming step against these gradients, one mapping per target."""
        if len(targets) == 1:  # no copy
            stacked = {p: targets[0][p][None] for p in self.parameters}
        else:
            stacked = {p: torch.stack([target[p] for target in targets]) for p in self.parameters}
        self._scorer.targets, self._scorer.num_targets = stacked, len(targets)
        self.release()
        self.check.start(stacked)

    def hessian_product(self, batches: Sequence[Batch], vector: Sequence[Tensor]) -> list[Tensor]:
        """H·u of the validation loss of `batches`, u and result as a tensor per entry of `parameters`."""
        return hessian_vector_product(self.model, self.parameters, self._counted(batches), self.loss_fn, vector)

    def _counted(self, batches: Sequence[Batch]) -> list[tuple[Batch, int]]:
        return [(batch, count_targets(batch, self.shifts_labels)) for batch in batches]

    # ---- a step

    def begin_microbatch(self, layout: SampleLayout) -> None:
        """The next training forward and its backward belong to these samples."""
        scorer = self._scorer
        if not scorer.targets:
            return
        if self._finished:
            self.release()
        scorer.layout = layout
        reference = next(iter(scorer.targets.values()))
        dtype = linear.accumulation_dtype(reference.dtype)
        shape = (len(self.layers), scorer.num_targets, layout.num_samples)
        scorer.microbatches.append(MicroBatch(layout, torch.zeros(shape, dtype=dtype, device=reference.device)))

    def scores(self) -> StepScores:
        """Ends the step: figures of all samples since :meth:`validate`. Call it before clipping or `optimizer.step`.

        Raises:
            UncoveredGradientError: the self-check failed and `on_uncovered="error"`.
            RuntimeError: nothing was scored.
        """
        microbatches = self._scorer.microbatches
        if not microbatches:
            raise RuntimeError("no training forward since validate(): call engine.validate(...) before model(...)")
        self._scorer.layout = None
        if self.grad_norms:
            for microbatch in microbatches:
                self._scorer.add_shared_norms(microbatch)
        raw = torch.cat([m.layer_dots for m in microbatches], dim=2).double()
        self.check.half_precision = self._scorer.half_precision
        residual = self.check.residual(raw)
        share = 1 / (self.loss_scale() * world_size())
        norms = [m.sq_norms for m in microbatches if m.sq_norms is not None]
        layer_dots = (raw * share).cpu()
        scores = StepScores(
            dots=layer_dots.sum(0),
            layer_dots=layer_dots,
            sq_norms=torch.cat(norms).double().cpu() * share**2 if norms else None,
            token_dots=[m.token_dots.double().cpu() * share for m in microbatches if m.token_dots is not None],
            target_norms=self._target_norms() if self.grad_norms else None,
            residual=residual,
        )
        self._finished = True
        if not self.retain:
            for microbatch in microbatches:
                microbatch.kept.clear()
        return scores

    def rescore(self, target: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """⟨g_i, target⟩ by layer of the samples of the step that :meth:`scores` ended, `[L, M]`.

        Needs `retain=True`; the step's tensors are there until :meth:`release`.
        """
        values = []
        for microbatch in self._scorer.microbatches:
            dots = torch.zeros(len(self.layers), microbatch.layout.num_samples, dtype=torch.float64)
            for layer, call in microbatch.kept:
                targets = {name: target[p][None] for name, p in layer.parameters.items()}
                for term in layer.rule.dots(layer, call, targets):
                    dots[self._scorer.index[layer]] += microbatch.layout.sum_samples(term)[0].double().cpu()
            values.append(dots / (self.loss_scale() * world_size()))
        return torch.cat(values, dim=1)

    def rescored(self, scores: StepScores, targets: Sequence[Mapping[nn.Parameter, Tensor]]) -> StepScores:
        """The same samples' figures against other targets."""
        layer_dots = torch.stack([self.rescore(target) for target in targets], dim=1)
        norms = torch.stack([torch.stack([linear.flat_dot(t, t) for t in x.values()]).sum() for x in targets])
        return replace(scores, layer_dots=layer_dots, dots=layer_dots.sum(0), target_norms=norms.sqrt().cpu())

    def _target_norms(self) -> Tensor:
        per_target = [torch.stack([linear.flat_dot(t, t) for t in ts]) for ts in self._scorer.targets.values()]
        return torch.stack(per_target).sum(0).sqrt().cpu()

    def target(self, parameter: nn.Parameter) -> Tensor:
        """What the parameter's gradient is scored against, `[K, *shape]`."""
        return self._scorer.targets[parameter]

    def batch_gradient(self) -> dict[nn.Parameter, Tensor]:
        """The step's unclipped accumulated gradient, averaged over ranks; needs `keep_grads=True`."""
        grads = {p: self._kept_grads.get(p, torch.zeros_like(p)) for p in self.parameters}
        mean_over_ranks(grads.values())
        return {p: grad / self.loss_scale() for p, grad in grads.items()}

    def clip_coefficient(self) -> float:
        """What the gradient was multiplied by between backward and now; call it after clipping, before the step."""
        return self.check.clip_coefficient()

    def release(self) -> None:
        """Forgets the step's tensors (the next step does it too)."""
        self._finished = False
        self._scorer.microbatches, self._kept_grads = [], {}

    # ---- hooks of the model

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scorer = self._scorer
        if scorer.replaying:  # the model is itself a layer
            return
        trains = module.training and torch.is_grad_enabled()
        if scorer.is_recording:
            scorer.layout = infer_layout(args, kwargs)
        elif trains and self._starts_itself:
            self.begin_microbatch(infer_layout(args, kwargs))
        # An evaluation between forward and backward (TRL makes one for its metrics) is not part of the step.
        scorer.suspended = not trains and not scorer.is_recording
        scorer.in_forward = trains

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._scorer.replaying:
            self._scorer.in_forward = self._scorer.suspended = False

    def _grad_hook(self, parameter: nn.Parameter) -> None:
        if self._scorer.microbatches and self.is_last_microbatch():
            self.check.record(parameter)
            if self.keep_grads:
                assert parameter.grad is not None
                self._kept_grads[parameter] = parameter.grad.detach().clone()


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


def _announce_general_rule(layers: Sequence[Layer]) -> None:
    kinds = sorted({type(layer.module).__name__ for layer in layers if not layer.rule.known})
    if kinds:
        logger.warning(
            "no closed form for %s: their forward is replayed along the validation gradient, exact but slower",
            ", ".join(kinds),
        )
