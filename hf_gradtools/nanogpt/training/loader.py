"""Batches of blocks for `Trainer`, at the price of one gather: no collator, no sampler's draws, no wrapper."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_gradtools.nanogpt.data.blocks import TokenBlocks
from hf_gradtools.workflow.loader import ConsecutiveBatches


__all__ = ["block_loader"]


class _WholeBatches(Dataset[dict[str, torch.Tensor]]):
    """Hands `DataLoader` a batch where it expects a list of samples to collate."""

    def __init__(self, blocks: TokenBlocks):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.blocks[index]

    def __getitems__(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return self.blocks.batch(indices)


def block_loader(
    blocks: TokenBlocks, batches: int, batch_size: int, process_index: int = 0, processes: int = 1
) -> DataLoader[Any]:
    """A loader of `batches` batches, in which a resumed run can skip those it has had.

    Args:
        blocks (`TokenBlocks`): where they come from.
        batches (`int`): how many this process gets.
        batch_size (`int`): blocks in each.
        process_index, processes (`int`): which process of how many this is; no two get the same samples.

    Returns:
        `DataLoader`: of `input_ids` and `shift_labels`, each of shape `(batch_size, block_size)`.
    """
    return DataLoader(
        _WholeBatches(blocks),
        batch_sampler=ConsecutiveBatches(batches, batch_size, process_index, processes),
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else it would draw from the generator of dropout
    )


def _as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch
