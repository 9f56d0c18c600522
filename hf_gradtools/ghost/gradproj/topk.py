"""The best rows of each query while scores stream by. Shape letters: Q queries, n rows of a block, k kept."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class RunningTopK:
    """Keeps the k largest scores of each query; of equal scores the lower row.

    Args:
        num_queries: Q.
        k: how many to keep.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self._queries, self._rows = np.empty(0, np.int64), np.empty(0, np.int64)
        self._scores = np.empty(0, np.float32)
        self._least = torch.full((num_queries,), -torch.inf)  # what a later row has to exceed

    def update(self, first_row: int, scores: Tensor) -> None:
        """Takes the scores `[n, Q]` of the next n rows."""
        values, least = scores.numpy(), self._least.numpy()
        if len(values) > self.k and not np.isfinite(least).any():  # of the first rows nearly all would be better
            least = np.nextafter(scores.topk(self.k, dim=0).values[-1].numpy(), -np.inf)
        found = np.flatnonzero(values > least)
        if not len(found):
            return
        rows, queries = np.divmod(found, values.shape[1])
        self._queries = np.concatenate([self._queries, queries])
        self._rows = np.concatenate([self._rows, rows + first_row])
        self._scores = np.concatenate([self._scores, values.reshape(-1)[found]])
        self._prune()

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(query, rank from 1, row, score), each `[Q * k]`, by query and rank."""
        _, ranks = self._ranked()
        return self._queries, ranks + 1, self._rows, self._scores

    def _prune(self) -> None:
        order, ranks = self._ranked()
        kept = order[ranks < self.k]
        self._queries, self._rows, self._scores = self._queries[kept], self._rows[kept], self._scores[kept]
        last = ranks[ranks < self.k] == self.k - 1
        self._least[torch.from_numpy(self._queries[last])] = torch.from_numpy(self._scores[last])

    def _ranked(self) -> tuple[np.ndarray, np.ndarray]:
        """The order by query, score and row; and in that order the rank within the query."""
        order = np.lexsort((self._rows, -self._scores, self._queries))
        queries = self._queries[order]
        starts = np.searchsorted(queries, queries)
        return order, np.arange(len(queries)) - starts
