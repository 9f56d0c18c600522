"""Mean, spread, tails and largest value of a stream of numbers, in one pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


__all__ = ["Moments"]

CHUNK = 1 << 22  # values taken to float64 at once: 32 MiB


@dataclass
class Moments:
    """Central moments of all values seen, in float64.

    Two streams are joined by the formulas of Pébay; each part is reduced about its own mean, so that nothing cancels.

    Args:
        count: values seen.
        mean: of them.
        m2, m3, m4: sums of powers of their differences from the mean.
        abs_max: largest absolute value.

    Source: P. Pébay, "Formulas for Robust, One-Pass Parallel Computation of Covariances and Arbitrary-Order
    Statistical Moments", 2008, equations 2.1 to 2.5.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    abs_max: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of the elements of a tensor."""
        moments = cls()
        moments.update(values)
        return moments

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Adds the elements of a tensor; costs 8 operations on each."""
        for part in values.detach().flatten().split(CHUNK) if values.numel() else ():
            part = (part.cpu() if part.device.type == "mps" else part).double()  # mps has no float64
            mean = part.mean()
            off = part - mean
            square = off * off
            sums = torch.stack([mean, square.sum(), (square * off).sum(), (square * square).sum(), part.abs().max()])
            self.merge(Moments(part.numel(), *sums.tolist()))

    def merge(self, other: Moments) -> None:
        """Adds what another has seen."""
        if other.count == 0:
            return
        a, b, n = self.count, other.count, self.count + other.count
        delta = other.mean - self.mean
        step = delta / n
        self.m4 += other.m4 + delta * step**3 * a * b * (a * a - a * b + b * b)
        self.m4 += 6 * step**2 * (a * a * other.m2 + b * b * self.m2) + 4 * step * (a * other.m3 - b * self.m3)
        self.m3 += other.m3 + delta * step**2 * a * b * (a - b) + 3 * step * (a * other.m2 - b * self.m2)
        self.m2 += other.m2 + delta * step * a * b
        self.mean += b * step
        self.count = n
        # max() of Python would drop a NaN that comes second.
        self.abs_max = math.nan if math.isnan(other.abs_max) else max(self.abs_max, other.abs_max)

    @property
    def stdev(self) -> float:
        """Standard deviation, of the values as a whole: divided by their number."""
        return math.sqrt(self.m2 / self.count) if self.count else math.nan

    @property
    def kurtosis(self) -> float:
        """Fisher's: 0 for a normal distribution, above it for heavier tails; NaN if all values are equal."""
        return self.count * self.m4 / self.m2**2 - 3 if self.m2 > 0 else math.nan
