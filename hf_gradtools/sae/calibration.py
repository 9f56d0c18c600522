"""Where training begins: the geometric median of the activations, and the factor that gives them unit variance."""

from __future__ import annotations

from torch import Tensor


__all__ = ["geometric_median", "unit_scale"]


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
