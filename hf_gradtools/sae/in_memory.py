"""Activations that are tensors already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


__all__ = ["TensorActivations"]


class TensorActivations:
    """A source of activations held in memory, for [`SAETrainer`] and metrics.

    Args:
        activations (`Mapping[str, Tensor]`): `[N, D]` by hookpoint, all of the same tokens.

    Raises:
        ValueError: there are none, or they are not of the same tokens.
    """

    def __init__(self, activations: Mapping[str, Tensor]):
        shapes = {name: tuple(tensor.shape) for name, tensor in activations.items()}
        lengths = {shape[0] for shape in shapes.values() if len(shape) == 2}
        if len(lengths) != 1 or any(len(shape) != 2 for shape in shapes.values()):
            raise ValueError(f"activations have shapes {shapes}; need [N, D] of the same N at every hookpoint.")
        self.activations = dict(activations)
        self.hookpoints = list(activations)
        self.num_tokens: int = lengths.pop()
        self.dtype: torch.dtype = next(iter(activations.values())).dtype

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return self.activations[hookpoint].shape[1]

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The tokens from `start` to `end`, in one piece."""
        yield {name: self.activations[name][start:end] for name in self.hookpoints}
