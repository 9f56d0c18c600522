"""Massive activations: few tokens, most of them attention sinks, with hidden states many times as long as all others.

They hold most of the variance: trained on, they are what an autoencoder learns first; measured, they hide the rest.
Source:
    [Massive Activations in Large Language Models](https://arxiv.org/abs/2402.17762).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from hf_gradtools.sae.shuffling import ActivationSource

__all__ = ["Inliers", "within"]


def within(x: Tensor, center: Tensor, radius: float) -> Tensor:
    """`x` `[N, D]`, with `center` in the place of tokens farther from it than `radius`."""
    far = _far(x, center, radius)
    return torch.where(far[:, None], center, x) if bool(far.any()) else x  # most batches have none


class Inliers:
    """A source of activations without those farther from a center than a radius, at each hookpoint.

    Args:
        source ([`ActivationSource`]): the activations.
        bounds (`Mapping[str, tuple[Tensor, float]]`): center `[D]` and radius by hookpoint.

    Attributes:
        num_tokens: of the source: how many are left is known once they were read.
    """

    def __init__(self, source: ActivationSource, bounds: Mapping[str, tuple[Tensor, float]]):
        self.source, self.bounds = copy.copy(source), bounds
        self.source.hookpoints = self.hookpoints = list(bounds)
        self.num_tokens, self.dtype = source.num_tokens, source.dtype

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return self.source.d_in(hookpoint)

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """What is left of the tokens from `start` to `end`, at each hookpoint in its own number."""
        for chunk in self.source.chunks(start, end):
            yield {name: self._kept(rows, *self.bounds[name]) for name, rows in chunk.items()}

    def _kept(self, rows: Tensor, center: Tensor, radius: float) -> Tensor:
        return rows[~_far(rows.float(), center.to(rows.device), radius)]


def _far(x: Tensor, center: Tensor, radius: float) -> Tensor:
    distances = (x - center).norm(dim=1)
    return (distances > radius) & distances.isfinite()  # what is not finite stays, to be told of
