"""Frequencies and damping that follow the loss, as the seed of GRIT has them."""

from __future__ import annotations

import math
import statistics
from collections import deque


WINDOW = 20  # losses
FREQUENCY_BOUNDS = (1, 2000)
DAMPING_BOUNDS = (1e-6, 1e-2)
FEWEST_FOR_DAMPING = 10


class LossWindow:
    """The last losses, one per optimizer step."""

    def __init__(self, losses: list[float] | None = None):
        self.losses = deque(losses or [], maxlen=WINDOW)

    def observe(self, loss: float) -> None:
        if math.isfinite(loss):  # one that is not says nothing of the trend
            self.losses.append(loss)

    def frequency(self, base: int) -> int:
        """`base` steps × 1.5 while the loss improves (second half of a full window more than 1 % below the first),
        × 0.75 when it does not; `base` until the window is full."""
        if len(self.losses) < WINDOW:
            return base
        losses = list(self.losses)
        first, second = statistics.fmean(losses[: WINDOW // 2]), statistics.fmean(losses[WINDOW // 2 :])
        improved = first - second > 0.01 * abs(first)
        return min(max(int(base * (1.5 if improved else 0.75)), FREQUENCY_BOUNDS[0]), FREQUENCY_BOUNDS[1])

    def damping(self, base: float) -> float:
        """`base + std(losses)`, more while the loss is noisy; `base` until there are ten losses."""
        if len(self.losses) < FEWEST_FOR_DAMPING:
            return base
        low, high = DAMPING_BOUNDS
        return min(max(base + statistics.pstdev(self.losses), low), max(high, base))
