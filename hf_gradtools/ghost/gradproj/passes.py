"""One forward and backward pass of a batch, observed layer by layer, that leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ...core import linear
from ...core.calls import Layer
from ...core.capture import LayerCapture, Observer
from ...core.quantized import keep_quantized_gradients
from ...core.samples import SampleLayout
from ..layout import infer_layout
from ..models import base_model, shifts_labels
from ..rows import target_counts
from ..validation import LossFn, evaluating, model_loss


Watching = TypeVar("Watching", bound=Observer)


class Collector(Observer, Protocol):
    """An observer that makes a row of numbers of every sample, linear in its gradient's size."""

    def begin(self, layout: SampleLayout, device: torch.device, dtype: torch.dtype) -> None:
        """The calls from here on are of these samples."""

    def take(self) -> Tensor:
        """Ends the batch: `[num_samples, ...]`."""


class GradientPass:
    """Runs batches through a model whose weights need no gradient; only output gradients are propagated.

    Args:
        model: run in eval mode.
        layers: that are observed.
        loss_fn: the mean loss of a batch.
        loss_reduction: "mean" or "sum", of a sample's loss.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], loss_fn: LossFn, loss_reduction: str):
        self.model, self.layers, self.loss_fn, self.loss_reduction = model, layers, loss_fn, loss_reduction
        self._shifts_labels = shifts_labels(model)
        parameter = next(iter(layers[0].parameters.values()))
        self.device, self.dtype = parameter.device, linear.accumulation_dtype(parameter.dtype)

    @contextmanager
    def observed(self, observer: Watching, frozen: bool = True) -> Iterator[Watching]:
        """Taps on the layers; with `frozen` no parameter needs a gradient, without the layers' parameters do."""
        flags = {p: p.requires_grad for p in self.model.parameters()}
        chosen = set() if frozen else {p for layer in self.layers for p in layer.parameters.values()}
        capture = LayerCapture(self.layers, observer, frozen=True)
        restore_quantized = keep_quantized_gradients(self.model)
        with evaluating(self.model), _plain_outputs(self.model):
            try:
                for p in flags:
                    p.requires_grad_(p in chosen)
                capture.attach()
                yield observer
            finally:
                capture.detach()
                restore_quantized()
                for p, flag in flags.items():
                    p.requires_grad_(flag)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The batch's loss, ready to run backward.

        Raises:
            ValueError: it does not depend on any observed layer.
        """
        with torch.enable_grad():
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any of the chosen layers; check layers=[...], and that loss_fn returns "
                "a tensor computed with gradients enabled"
            )
        return loss

    def project(self, collector: Collector, batch: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """Projected gradients `[N, dim]` of each sample's own loss, and how many labels count in it.

        Without such labels a gradient is zero.
        """
        layout = infer_layout((), batch)
        counts = self.target_counts(batch)
        collector.begin(layout, self.device, self.dtype)
        if counts.sum() > 0:
            self.loss(batch).backward()
        rows = collector.take()
        # The loss is the mean over all targets of the batch; a sample's own mean is over its targets alone.
        factor = counts.sum() / counts if self.loss_reduction == "mean" else counts.sum().expand_as(counts)
        factor = torch.where(counts > 0, factor, 0.0)
        return rows * factor.to(rows)[:, None], counts.long().tolist()

    def target_counts(self, batch: dict[str, Any]) -> Tensor:
        """Labels that count in each sample's loss, `[N]`; one where the loss is not of labels.

        Raises:
            ValueError: the model is to return a loss and there are no labels.
        """
        layout = infer_layout((), batch)
        counts = target_counts(batch, layout, self._shifts_labels)
        if counts is not None:
            return counts.cpu().double()
        if self.loss_fn is model_loss and not any("label" in name or "positions" in name for name in batch):
            raise ValueError(
                f"batches have no 'labels' (columns {sorted(batch)}), so the model returns no loss; add labels to the "
                "rows, pass a data_collator that makes them, or loss_fn=..."
            )
        return torch.ones(layout.num_samples, dtype=torch.float64)


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Without the key-value cache that models fill by default and no loss needs, and without the balancing loss of
    experts, which is of the batch and no sample's own."""
    config = getattr(base_model(model), "config", None)
    switched_on = [name for name in ("use_cache", "output_router_logits") if getattr(config, name, False)]
    for name in switched_on:
        setattr(config, name, False)
    try:
        yield
    finally:
        for name in switched_on:
            setattr(config, name, True)
