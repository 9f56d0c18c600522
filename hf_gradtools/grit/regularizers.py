"""The curvature and reprojection regularisers, by the gradients of their closed forms.

They are added to the gradients just before the step: no trainer's loss is touched, evaluation losses least of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_gradtools.grit.cut import kept_projectors


if TYPE_CHECKING:
    from hf_gradtools.grit.config import GritConfig
    from hf_gradtools.grit.controller import GritController
    from hf_gradtools.grit.layer import SteeredLayer


def curvature_energy(A: Tensor, B: Tensor, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
    """`tr(B Σ_a Bᵀ) + tr(Aᵀ Σ_g A)`: the mean square of the adapter's output and of the gradient it sends back.

    Args:
        A: `[R, I]`.
        B: `[O, R]`.
        activation: Σ_a `[R, R]`.
        gradient: Σ_g `[R, R]`.

    Returns:
        the energy, and its gradients in A and B.
    """
    to_a, to_b = gradient @ A, B @ activation
    return (to_b * B).sum() + (to_a * A).sum(), 2 * to_a, 2 * to_b


def projection_distance(A: Tensor, B: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
    """`‖A - left A‖² + ‖B - B right‖²`, what a cut would take away, and its gradients in A and B.

    Args:
        A: `[R, I]`.
        B: `[O, R]`.
        left: projector `[R, R]`.
        right: projector `[R, R]`.
    """
    gone_a, gone_b = A - left @ A, B - B @ right
    return (
        gone_a.square().sum() + gone_b.square().sum(),
        2 * (gone_a - left.mT @ gone_a),
        2 * (gone_b - gone_b @ right.mT),
    )


class Regularizers:
    """Adds the weighted gradients of both regularisers to `.grad`."""

    def __init__(self, config: GritConfig):
        self.config = config
        self._projectors: dict[str, tuple[Tensor, Tensor]] | None = None

    def forget(self) -> None:
        """Factors or ranks have changed: what a cut would keep is to be found anew."""
        self._projectors = None

    @torch.no_grad()
    def add_grads(self, controller: GritController, scale: float = 1.0) -> dict[str, Tensor]:
        """Adds to the gradients of one step.

        Args:
            controller: holds layers and factors.
            scale: of the gradients that are there.

        Returns:
            the weighted regularisers, by what to log them as.
        """
        config, losses = self.config, {}
        ramp = min(1.0, (controller.step + 1) / max(config.regularizer_warmup_steps, 1))
        if config.lambda_kfac:
            weight = config.lambda_kfac * ramp
            terms = {
                layer: curvature_energy(layer.A.to(f), layer.B.to(f), *f)
                for layer, f in controller.measured_layers()
                if _takes_part(layer)
            }
            losses["loss_kfac"] = _add(terms, weight, scale)
        if config.lambda_reproj:
            if self._projectors is None:
                self._projectors = kept_projectors(controller)
            weight = config.lambda_reproj * ramp
            terms = {
                layer: projection_distance(layer.A, layer.B, *(p.to(layer.A) for p in self._projectors[layer.name]))
                for layer in controller.layers
                if layer.name in self._projectors and _takes_part(layer)
            }
            losses["loss_reproj"] = _add(terms, weight, scale)
        return losses


def _takes_part(layer: SteeredLayer) -> bool:
    return layer.A.grad is not None and layer.B.grad is not None


def _add(terms: dict[SteeredLayer, tuple[Tensor, Tensor, Tensor]], weight: float, scale: float) -> Tensor:
    total = torch.zeros(())
    for layer, (value, to_a, to_b) in terms.items():
        layer.A.grad += (weight * scale * to_a).to(layer.A.dtype)
        layer.B.grad += (weight * scale * to_b).to(layer.B.dtype)
        total = total.to(value) + weight * value
    return total
