"""Where training begins: the middle of the activations, their scale, and the first features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


__all__ = ["data_directions", "encoder_scale", "geometric_median", "scale_below_thresholds", "unit_scale"]


def geometric_median(x: Tensor, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to those given, which few outliers do not move.

    Args:
        x (`Tensor`): `[N, D]`.
        max_iterations (`int`): of Weiszfeld's algorithm.
        tolerance (`float`): ends it once the point moves less, relative to its mean distance from those given.

    Returns:
        `Tensor`: `[D]`, float32.
    """
    x = x.double()
    point = x.mean(0)
    for _ in range(max_iterations):
        distances = (x - point).norm(dim=1)
        spread = distances.mean()
        if spread == 0:
            break
        weights = 1 / distances.clamp_min(1e-12 * float(spread))
        moved = (weights @ x) / weights.sum()
        step, point = (moved - point).norm(), moved
        if step < tolerance * spread:
            break
    return point.float()


def unit_scale(x: Tensor, center: Tensor) -> float:
    """The factor s for which `s * (x - center)` has a mean square of one.

    Raises:
        ValueError: all tokens are the same.
    """
    mean_square = float((x.double() - center.double()).square().mean())
    if not 0 < mean_square < float("inf"):
        raise ValueError(
            f"the activations have mean square {mean_square} around their median; a positive number is needed. "
            "Look at the hookpoint's hidden states: they are constant, or not finite."
        )
    return mean_square**-0.5


def data_directions(x: Tensor, center: Tensor, count: int, seed: int) -> Tensor:
    """Unit vectors from the center to different tokens, or random ones where there are too few.

    Args:
        x (`Tensor`): `[N, D]`.
        center (`Tensor`): `[D]`.
        count (`int`): how many.
        seed (`int`): of the choice.

    Returns:
        `Tensor`: `[count, D]`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(x), generator=generator)[:count].to(x.device)
    directions = torch.randn(count, x.shape[1], generator=generator).to(x)
    found = x[chosen] - center
    nonzero = found.norm(dim=1) > 0
    directions[: len(found)][nonzero] = found[nonzero]
    return F.normalize(directions, dim=1)


def encoder_scale(x: Tensor, reconstruction: Tensor) -> float:
    """The factor of reconstructions, both centred, that brings them nearest to `x`; 1 if there is none above zero."""
    length = float(reconstruction.double().square().sum())
    factor = float((x.double() * reconstruction.double()).sum()) / length if length else 0.0
    return factor if factor > 0 else 1.0


def scale_below_thresholds(x: Tensor, reconstruct: Callable[[float], Tensor], steps: int = 12) -> float:
    """The scale of an encoder at which reconstructions are as long as `x`, where thresholds do not scale with it.

    Features fall below them as the encoder shrinks, so that [`encoder_scale`] would leave none: found by bisection.

    Args:
        x (`Tensor`): `[N, D]`, centred.
        reconstruct (`Callable`): centred reconstructions `[N, D]` with the encoder times a scale.
        steps (`int`, defaults to 12): halvings of the logarithm of 10⁹.
    """
    low, high = 1e-6, 1e3
    for _ in range(steps):
        middle = math.sqrt(low * high)
        reconstruction = reconstruct(middle).double()
        if float((reconstruction * (reconstruction - x)).sum()) > 0:  # longer than their projection on x
            high = middle
        else:
            low = middle
    return high
