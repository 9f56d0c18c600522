"""What is computed when backward reaches a layer: its part in every sample's projected gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...core.calls import Layer, LayerCall
from ...core.projection import Projection
from ...core.samples import SampleLayout
from .blocks import parameter_names


class ProjectionCollector:
    """The observer of the layers: adds what it finds to the rows of the current batch.

    Args:
        layers: whose gradients are projected.
        projection: how.
        on_failure: called before an exception leaves through a `backward()` where nobody cleans up.

    Attributes:
        factors: what gradients are multiplied by, entry by entry, before they are projected; none by default.
        block_sums: when a dict, also collects the sum over samples of each block's first stage, `[k_out, k_in]`.
        suspended: calls are not of the batch.
        half_precision: half-precision gradients have been seen.
    """

    def __init__(self, layers: Sequence[Layer], projection: Projection, on_failure: Callable[[], None] = lambda: None):
        self.layers, self.projection, self.on_failure = layers, projection, on_failure
        self.names = parameter_names(layers)
        self.factors: Mapping[nn.Parameter, Tensor] | None = None
        self.block_sums: dict[str, Tensor] | None = None
        self.suspended = self.half_precision = False
        self._layout: SampleLayout | None = None
        self._rows: Tensor | None = None
        self._replaying = False

    def begin(self, layout: SampleLayout, device: torch.device, dtype: torch.dtype) -> None:
        """The calls from here on are of these samples."""
        self._layout = layout
        self._rows = torch.zeros(layout.num_samples, self.projection.dim, dtype=dtype, device=device)

    def take(self) -> Tensor:
        """Ends the batch: `[num_samples, dim]`, gradients of each sample's part in the loss that ran backward."""
        assert self._rows is not None
        rows, self._rows, self._layout = self._rows, None, None
        return rows

    def drop(self) -> None:
        """Forgets a batch that is not finished."""
        self._rows = self._layout = None

    # ---- Observer

    def rows(self) -> int | None:
        return None if self._layout is None or self.suspended or self._replaying else self._layout.rows

    def seen(self, layer: Layer) -> None:
        pass

    def observe(self, layer: Layer, call: LayerCall) -> None:
        assert self._layout is not None
        assert self._rows is not None
        self.half_precision |= any(g is not None and g.element_size() < 4 for g in call.output_grads)
        self._replaying = True
        try:
            for name, projected in self._project(layer, call, self._layout).items():
                block = self.names[layer.parameters[name]]
                self.projection.add(self._rows, block, projected.to(self._rows.dtype))
                if self.block_sums is not None:
                    self.block_sums[block] = projected.sum(0) + self.block_sums.get(block, 0.0)
        except BaseException:
            self.on_failure()
            raise
        finally:
            self._replaying = False

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        return False

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        raise NotImplementedError("projections leave the weight gradient to autograd")

    def _project(self, layer: Layer, call: LayerCall, layout: SampleLayout) -> dict[str, Tensor]:
        bases = {name: self.projection.bases[self.names[p]] for name, p in layer.parameters.items()}
        factors = None
        if self.factors is not None:
            factors = {name: self.factors[p] for name, p in layer.parameters.items()}
        try:
            return layer.rule.project(layer, call, layout, bases, factors)
        except ValueError as error:
            raise ValueError(
                f"layer {layer.name!r}: {error}. Leave it out by layers=[...] or freeze its parameters."
            ) from None
