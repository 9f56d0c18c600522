"""The curvature and reprojection regularisers, by the gradients of their closed forms.

They are added to the gradients just before the step: no trainer's loss is touched, evaluation losses least of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_gradtools.core.curvature import energies, projectors, rank_for_energy


if TYPE_CHECKING:
    from hf_gradtools.grit.config import GritConfig
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


@torch.no_grad()
def add_regularizer_grads(
    config: GritConfig, measured: Sequence[tuple[SteeredLayer, Tensor]], step: int, scale: Any = 1.0
) -> dict[str, Tensor]:
    """Adds the weighted gradients of both regularisers to `.grad`.

    Args:
        config: weights, warm-up, and the cut whose distance is meant.
        measured: layers and their factors `[2, R, R]`.
        step: optimizer steps taken.
        scale: of the gradients that are there.

    Returns:
        the weighted regularisers, by what to log them as.
    """
    ramp = min(1.0, (step + 1) / max(config.regularizer_warmup_steps, 1))
    losses: dict[str, Tensor] = {}
    if config.lambda_kfac:
        losses["loss_kfac"] = _add(config.lambda_kfac * ramp, scale, measured, curvature_energy)
    if config.lambda_reproj:

        def distance(A: Tensor, B: Tensor, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
            left, right = _kept(config, activation, gradient)
            return projection_distance(A, B, left.to(A), right.to(B))

        losses["loss_reproj"] = _add(config.lambda_reproj * ramp, scale, measured, distance)
    return losses


def _add(weight: float, scale: Any, measured: Sequence[tuple[SteeredLayer, Tensor]], energy: Any) -> Tensor:
    total = torch.zeros(())
    for layer, factors in measured:
        if layer.A.grad is None or layer.B.grad is None:
            continue
        value, to_a, to_b = energy(layer.A.to(factors), layer.B.to(factors), *factors)
        layer.A.grad += (weight * scale * to_a).to(layer.A.dtype)
        layer.B.grad += (weight * scale * to_b).to(layer.B.dtype)
        total = total.to(value) + weight * value
    return total


def _kept(config: GritConfig, activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    method, rank = config.reprojection or "balanced", min(config.reprojection_k, activation.shape[-1])
    if config.enable_rank_adaptation:
        least = min(config.min_lora_rank, activation.shape[-1])
        spectrum = energies(method, activation, gradient)
        rank = int(rank_for_energy(spectrum, config.rank_adaptation_threshold, least))
    return projectors(method, activation, gradient, rank)
