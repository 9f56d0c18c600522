"""The order of a run's batches: consecutive numbers, dealt to the processes, of which a resumed run skips some."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


__all__ = ["ConsecutiveBatches"]


class ConsecutiveBatches(Sampler[np.ndarray]):
    """Numbers of the samples of each batch: 0, 1, 2, … dealt to the processes batch by batch.

    Args:
        batches (`int`): how many this process gets.
        batch_size (`int`): samples in each.
        process_index, processes (`int`): which process of how many this is; no two get the same samples.
    """

    def __init__(self, batches: int, batch_size: int, process_index: int = 0, processes: int = 1):
        self.batches, self.batch_size = batches, batch_size
        self.process_index, self.processes = process_index, processes

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[np.ndarray]:
        rows = np.arange(self.batch_size)
        for batch in range(self.batches):
            yield rows + (batch * self.processes + self.process_index) * self.batch_size
