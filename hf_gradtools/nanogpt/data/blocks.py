"""Blocks of a token file: nanoGPT's (x, y) pairs, at offsets that depend on nothing but the seed and the index.

Shapes: B blocks, T tokens in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset


__all__ = ["TokenBlocks"]

# Multipliers of SplitMix64 (Steele, Lea, Flood 2014), whose output for consecutive inputs passes as random.
GOLDEN, FIRST, SECOND = (np.uint64(m) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of `block_size` tokens and, for each token, the one after it.

    Sample i is the same whenever and wherever it is asked for, so that a resumed run goes on with the data that the
    interrupted one would have seen.

    Args:
        tokens (`np.ndarray` or `np.memmap` of shape `(N,)`): ids.
        block_size (`int`): tokens in a block.
        seed (`int`, defaults to 0): of the offsets.
        length (`int`, *optional*): how many samples; default as many as blocks fit side by side. Samples beyond it
            are drawn just so.

    Raises:
        ValueError: there is not one block.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int = 0, length: int | None = None):
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1.")
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"block_size={block_size} needs {block_size + 1} tokens, and there are {len(tokens)}. "
                "Pass a smaller block_size or prepare more text."
            )
        self.block_size, self.seed = block_size, seed
        self.length = max(len(tokens) // block_size, 1) if length is None else length
        self._windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)
        self._key = _mix(np.asarray([seed], np.int64).astype(np.uint64) * SECOND + GOLDEN)

    def __len__(self) -> int:
        return self.length

    def offsets(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Where samples begin.

        Args:
            indices (of shape `(B,)`): numbers of samples.

        Returns:
            `np.ndarray` of shape `(B,)`: uniform over all blocks of the file.
        """
        numbers = np.asarray(indices, np.int64).astype(np.uint64)
        return (_mix(numbers * GOLDEN + self._key) % np.uint64(len(self._windows))).astype(np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Samples, stacked.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids` and `shift_labels`, contiguous, of type int64 and shape `(B, T)`.
        """
        windows = self._windows[self.offsets(indices)]
        return {
            "input_ids": torch.from_numpy(windows[:, :-1].astype(np.int64)),
            "shift_labels": torch.from_numpy(windows[:, 1:].astype(np.int64)),
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return {name: rows[0] for name, rows in self.batch([index]).items()}


def _mix(state: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64."""
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    return state ^ (state >> np.uint64(31))
