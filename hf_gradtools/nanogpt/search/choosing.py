"""Which candidate a round of the greedy search accepts. Pure functions of scores and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


__all__ = ["Choice", "Comparison", "Measured", "choose", "compare"]

DOMINATES, RATIO = "better or as good, and cheaper or as cheap", "best gain per cost"


@dataclass(frozen=True)
class Measured:
    """A configuration's worth and price.

    Args:
        scores (`tuple[float, ...]`): e^-loss, one for each seed; the same seeds in every configuration of a search.
        cost (`float`): in the unit of the search.
    """

    scores: tuple[float, ...]
    cost: float

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Comparison:
    """A candidate against the configuration that it would replace.

    Args:
        gain (`float`): mean difference of scores.
        standard_error (`float`): of `gain`, over seeds; 0 for one seed.
        cost (`float`): difference of costs.
        noise (`float`): gains up to it are not told from none.
    """

    gain: float
    standard_error: float
    cost: float
    noise: float

    @property
    def dominates(self) -> bool:
        """Neither worse nor dearer, and better or cheaper."""
        return self.gain >= 0 and self.cost <= 0 and (self.gain > self.noise or self.cost < 0)

    @property
    def pays(self) -> bool:
        """Better, and dearer."""
        return self.gain > self.noise and self.cost > 0

    @property
    def efficiency(self) -> float:
        """Gain per cost; infinite for what dominates, and NaN where there is neither gain nor cost."""
        if self.dominates:
            return math.inf
        return (
            self.gain / self.cost
            if self.cost
            else (math.nan if self.gain == 0 else math.copysign(math.inf, self.gain))
        )


@dataclass(frozen=True)
class Choice:
    """What a round accepts.

    Args:
        index (`int`): of the candidate.
        rule (`str`): why.
    """

    index: int
    rule: str


def compare(baseline: Measured, candidate: Measured, noise_guard: float = 1.0) -> Comparison:
    """Gain and added cost of a candidate.

    Args:
        baseline (`Measured`): what it would replace.
        candidate (`Measured`): of the same seeds.
        noise_guard (`float`, defaults to 1): standard errors that a gain must exceed, where there are several seeds.

    Raises:
        ValueError: the numbers of seeds differ.
    """
    gains = [after - before for before, after in zip(baseline.scores, candidate.scores, strict=True)]
    # Of the differences by seed: what a seed does to both configurations is no noise of their difference.
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return Comparison(statistics.fmean(gains), error, candidate.cost - baseline.cost, noise_guard * error)


def choose(comparisons: Sequence[Comparison | None]) -> Choice | None:
    """The candidate to accept, or None.

    One that is neither worse nor dearer than the baseline, and better or cheaper, comes before all others; of several,
    the one with the largest gain, then the one that saves most. Else the one with the largest gain per cost among
    those that are better. One that is worse is never accepted, however cheap.

    Args:
        comparisons (`Sequence[Comparison | None]`): None for a candidate that failed; of equals the first wins.
    """
    present = [(index, each) for index, each in enumerate(comparisons) if each is not None]
    if dominating := [(index, each) for index, each in present if each.dominates]:
        return Choice(max(dominating, key=lambda pair: (pair[1].gain, -pair[1].cost))[0], DOMINATES)
    if paying := [(index, each) for index, each in present if each.pays]:
        return Choice(max(paying, key=lambda pair: pair[1].efficiency)[0], RATIO)
    return None
