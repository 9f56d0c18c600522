"""Activations in memory: random ones, and sparse sums of known directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hf_gradtools.sae.in_memory import TensorActivations


class TensorSource(TensorActivations):
    """Tensors `[N, D]` in pieces, as activations come from a model or from disk."""

    def __init__(self, activations: Mapping[str, Tensor], piece: int = 100):
        super().__init__(activations)
        self.piece = piece

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        end = self.num_tokens if end is None else end
        for first in range(start, end, self.piece):
            last = min(first + self.piece, end)
            yield {name: self.activations[name][first:last] for name in self.hookpoints}


def correlated(num_tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """Normal vectors with a full covariance, a mean and a scale far from one."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator)
    return torch.randn(num_tokens, d_in, generator=generator) @ mixing * 5 + 20


def planted(num_tokens: int, d_in: int, num_features: int, active: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of `active` of `num_features` unit directions with positive weights, and these directions `[F, D]`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(num_features, d_in, generator=generator), dim=1)
    chosen = torch.rand(num_tokens, num_features, generator=generator).topk(active, dim=1).indices
    weights = 1 + torch.rand(num_tokens, active, generator=generator)
    return torch.einsum("nk,nki->ni", weights, directions[chosen]) + 3, directions
