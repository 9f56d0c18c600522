"""One order of tokens for all that train on activations, whether these come from a model or from disk.

N = tokens of the source, D = d_in. An epoch visits the source in blocks of `buffer_tokens` tokens, the blocks in a
seeded order and the tokens of each in another. Both depend on nothing but (seed, epoch, block, N).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


__all__ = ["ActivationSource", "ShuffledBatches"]


class ActivationSource(Protocol):
    """Activations of tokens in a fixed order, of several hookpoints at once."""

    hookpoints: list[str]
    num_tokens: int
    dtype: torch.dtype

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The tokens from `start` to `end` in pieces `{hookpoint: [n, D]}` of any length n."""


class ShuffledBatches:
    """Batches of activations in a seeded order, the same from every source that has the same tokens.

    The tokens at the end of an epoch's order that fill no batch are dropped in that epoch: at most
    `batch_tokens - 1`, others in each. Holds one block in memory: `buffer_tokens` × sum of d_in × bytes of the dtype.

    Args:
        source (`ActivationSource`): a [`ModelActivations`] or [`ActivationStore.source`].
        batch_tokens (`int`, defaults to 4096): tokens of a batch.
        buffer_tokens (`int`, defaults to 131_072): tokens of a block.
        seed (`int`, defaults to 0): of the order.
        epochs (`int`, defaults to 1): passes over the source.

    Raises:
        ValueError: if a number is below 1, or the source does not fill one batch.
    """

    def __init__(
        self,
        source: ActivationSource,
        batch_tokens: int = 4096,
        buffer_tokens: int = 131_072,
        seed: int = 0,
        epochs: int = 1,
    ) -> None:
        numbers = {"batch_tokens": batch_tokens, "buffer_tokens": buffer_tokens, "epochs": epochs}
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name}={number}; need at least 1. Pass {name}=1 or more.")
        if source.num_tokens < batch_tokens:
            raise ValueError(
                f"batch_tokens={batch_tokens} is more than the {source.num_tokens} tokens of the source; not one "
                "batch would be full. Pass more text, or a smaller batch_tokens."
            )
        self.source = source
        self.batch_tokens, self.buffer_tokens = batch_tokens, buffer_tokens
        self.seed, self.epochs = seed, epochs

    @property
    def batches_per_epoch(self) -> int:
        return self.source.num_tokens // self.batch_tokens

    def __len__(self) -> int:
        return self.epochs * self.batches_per_epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.iterate()

    def iterate(self, start_batch: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches from one on, as if those before had been taken; reads at most the block it begins in.

        Args:
            start_batch (`int`, defaults to 0): counted over all epochs.

        Yields:
            `dict[str, Tensor]`: `[batch_tokens, D]` by hookpoint, copies that are yours.

        Raises:
            ValueError: if `start_batch` is negative or beyond the last.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch} is outside 0 ... {len(self)}, the number of batches.")
        return self._from(start_batch)

    def order(self, epoch: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first token, order of the tokens from there on) of each block of an epoch, in the order of the visits."""
        num_tokens, size = self.source.num_tokens, self.buffer_tokens
        num_blocks = -(-num_tokens // size)
        for block in self._permutation(num_blocks, epoch, 0):
            first = int(block) * size
            yield first, self._permutation(min(size, num_tokens - first), epoch, 1 + int(block))

    def _permutation(self, length: int, *place: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *place]).permutation(length)

    def _from(self, start_batch: int) -> Iterator[dict[str, Tensor]]:
        epoch, skipped = divmod(start_batch, self.batches_per_epoch)
        buffer: dict[str, Tensor] = {}
        for number in range(epoch, self.epochs):
            yield from self._epoch(number, skipped * self.batch_tokens, buffer)
            skipped = 0

    def _epoch(self, epoch: int, position: int, buffer: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Batches from a position in the order of the epoch on."""
        parts: list[dict[str, Tensor]] = []
        missing = self.batch_tokens
        left = self.batches_per_epoch * self.batch_tokens - position
        for first, order in self.order(epoch):
            if position >= len(order):
                position -= len(order)
                continue
            if left == 0:
                return
            block = self._read(first, first + len(order), buffer)
            while position < len(order) and left:
                chosen = torch.from_numpy(order[position : position + min(missing, left)])
                parts.append({name: rows.index_select(0, chosen.to(rows.device)) for name, rows in block.items()})
                position, missing, left = position + len(chosen), missing - len(chosen), left - len(chosen)
                if missing == 0:
                    yield _joined(parts)
                    parts, missing = [], self.batch_tokens
            position = 0

    def _read(self, start: int, end: int, buffer: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block, in the memory of the last one."""
        filled = 0
        for chunk in self.source.chunks(start, end):
            for name, rows in chunk.items():
                if name not in buffer:
                    size = min(self.buffer_tokens, self.source.num_tokens)
                    buffer[name] = rows.new_empty(size, rows.shape[1])
                buffer[name][filled : filled + len(rows)] = rows
            filled += len(next(iter(chunk.values())))
        if filled != end - start:
            raise RuntimeError(f"the source gave {filled} of the tokens {start} ... {end}; need {end - start}.")
        return {name: rows[:filled] for name, rows in buffer.items()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
