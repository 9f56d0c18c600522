"""Search over stored gradients: a blocked matrix product that streams the rows, exact and in bounded memory.

Shape letters: Q queries, G groups of them, N rows, n of a block, d numbers in a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .precondition import Scorer, cosine_scorer, dot_scorer
from .queries import Queries, Reduction, resolve_queries
from .topk import RunningTopK


if TYPE_CHECKING:
    from datasets import Dataset

    from .store import GradientStore

Metric = Literal["dot", "cosine"]
Preconditioner = Literal["fisher", "adam"]
METRICS = ("dot", "cosine")
PRECONDITIONERS = (None, "fisher", "adam")
BACKENDS = ("exact", "faiss")
BLOCK_BYTES = 4 * 2**20  # of a block in float32: stays in the processor's cache
SCORE_BYTES = 8 * 2**20  # of the scores that are looked through at a time
MAX_SCORED_ROWS = 65_536
MIN_ROWS = 64


class Searchable(ABC):
    """What can be searched: a store, or several of the same samples with a weight each."""

    @property
    @abstractmethod
    def stores(self) -> list[GradientStore]:
        """The stores, of one checkpoint each."""

    @property
    @abstractmethod
    def weights(self) -> list[float]:
        """The weight of each store's scores."""

    @property
    @abstractmethod
    def sample_ids(self) -> np.ndarray:
        """`[N]` by row."""

    def __len__(self) -> int:
        return len(self.stores[0])

    def search(
        self,
        queries: Any,
        k: int = 10,
        metric: Metric = "dot",
        precondition: Preconditioner | None = None,
        *,
        damping: float = 0.1,
        reduce: Reduction | None = None,
        backend: Literal["exact", "faiss"] = "exact",
        progress: bool = True,
    ) -> Dataset:
        """The k rows with the largest scores for each query.

        Args:
            queries: gradients `[Q, d]` or `[d]` (tensor or array); another store of the same identity; tokenized rows
                (a `datasets.Dataset` or a list of dicts), which need `store.bind(projector)`; or a mapping from tasks
                to any of these, each searched for as one group. Of several stores: a list of arrays, one for each.
            k: rows for each query or group.
            metric: `"dot"`, or `"cosine"`, which takes the gradients' lengths out.
            precondition: `"fisher"` measures with the inverse of the stored rows' Fisher matrix (with `"cosine"` both
                sides are divided by their self-influence's root); `"adam"` takes the step that Adam would make for
                the gradient of each query, which the projector does from the optimizer's state.
            damping: of the Fisher matrix, as a share of its mean eigenvalue.
            reduce: one score for all queries, or for those of each task: the `"mean"` (default for tasks) or `"max"`.
            backend: `"exact"`, or `"faiss"`: a flat inner product index in memory, 4 * N * d bytes, built at the first
                search and kept; needs the extra `faiss`.
            progress: show a bar when it takes more than a second.

        Returns:
            a `datasets.Dataset` with `query` (number, or name of the task), `rank` (from 1), `row`, `sample_id` and
            `score`, by query and rank. Of equal scores the lower row comes first.

        Raises:
            StoreMismatchError: a store of queries has gradients of another identity.
            ValueError: an option is unknown, `k` is out of range, the store is empty, or queries do not fit.

        Costs 2 N Q d FLOPs and one pass over the store's files. Memory: blocks of 4 MiB, the queries, the scores of
        a block; and 8 d^2 bytes for the Fisher matrix.

        Source: Pruthi et al., TracIn, arXiv 2002.08484; Park et al., TRAK, arXiv 2303.14186; Choe et al., LoGra,
        arXiv 2405.13954; Barshan et al., RelatIF, arXiv 2003.11630; Xia et al., LESS, arXiv 2402.04333.
        """
        _check_choice("backend", backend, BACKENDS)
        if not isinstance(k, int):
            raise ValueError(f"k={k!r} must be an int.")
        if not 1 <= k <= len(self) and len(self):
            raise ValueError(f"k={k}, but the store has {len(self)} rows. Pass 1 <= k <= {len(self)}.")
        found, scorers = prepare(self, queries, metric, precondition, damping, reduce, progress)
        if backend == "faiss":
            from .faiss_index import faiss_search

            query, rank, row, score = faiss_search(self, found, scorers[0], (metric, precondition, damping), k)
        else:
            best = RunningTopK(len(found.names), k)
            for first, scores in stream_scores(self, found, scorers, progress):
                best.update(first, scores)
            query, rank, row, score = best.result()
            if len(row) < k * len(found.names) or not np.isfinite(score).all():
                raise ValueError(
                    "scores are not finite: gradients of queries or rows are too large for float32. Pass "
                    "metric='cosine', or scale the queries down."
                )
        return self._as_dataset(found, query, rank, row, score)

    def _as_dataset(
        self, queries: Queries, query: np.ndarray, rank: np.ndarray, row: np.ndarray, score: np.ndarray
    ) -> Dataset:
        from datasets import Dataset

        columns = {
            "query": [queries.names[i] for i in query],
            "rank": rank,
            "row": row,
            "sample_id": self.sample_ids[row],
            "score": score,
        }
        return Dataset.from_dict(columns)


def prepare(
    target: Searchable,
    queries: Any,
    metric: Metric,
    precondition: Preconditioner | None,
    damping: float,
    reduce: Reduction | None,
    progress: bool,
) -> tuple[Queries, list[Scorer]]:
    """The queries, and for each store what scores its rows; queries whose scores are averaged are so beforehand."""
    _check_choice("metric", metric, METRICS)
    _check_choice("precondition", precondition, PRECONDITIONERS)
    if len(target) == 0:
        raise ValueError(f"the store {target.stores[0].path} has no rows to search. Project a dataset into it first.")
    found = resolve_queries(target, queries, reduce, precondition == "adam")
    make = cosine_scorer if metric == "cosine" else dot_scorer
    scorers = []
    for store, weight, gradients in zip(target.stores, target.weights, found.gradients, strict=True):
        factor = store.fisher_factor(damping, progress) if precondition == "fisher" else None
        scorer = make(gradients, factor)
        if found.reduce == "mean":
            groups = scorer.weights.split(found.sizes, dim=1)
            scorer.weights = torch.stack([group.mean(dim=1) for group in groups], dim=1)
        scorer.weights *= weight
        scorers.append(scorer)
    return found, scorers


def stream_scores(
    target: Searchable, queries: Queries, scorers: list[Scorer], progress: bool
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, scores `[n, G]`) of many blocks at a time; the next ones overwrite them.

    Products are of small blocks, which stay in the cache; what is done with their scores has a price for each call.
    """
    columns, groups = scorers[0].weights.shape[1], len(queries.sizes)
    dim = max(store.dim for store in target.stores)
    rows = max(MIN_ROWS, min(BLOCK_BYTES // (4 * dim), SCORE_BYTES // (4 * columns)))
    streams = [store.blocks(4 * store.dim * rows) for store in target.stores]
    kept = torch.empty(max(rows, min(MAX_SCORED_ROWS, SCORE_BYTES // (4 * groups)) // rows * rows), groups)
    first = filled = 0
    with tqdm(total=len(target), desc="Searching", unit="row", unit_scale=True, disable=not progress, delay=1) as bar:
        for blocks in zip(*streams, strict=True):
            if filled + len(blocks[0][1]) > len(kept):
                yield first, kept[:filled]
                bar.update(filled)
                first, filled = first + filled, 0
            _score(blocks, scorers, queries, kept[filled : filled + len(blocks[0][1])])
            filled += len(blocks[0][1])
        yield first, kept[:filled]
        bar.update(filled)


def _score(blocks: Sequence[tuple[int, Tensor]], scorers: Sequence[Scorer], queries: Queries, out: Tensor) -> None:
    """Writes the scores `[n, G]` of a block of each store."""
    if queries.reduce != "max":
        scorers[0](blocks[0][1], out)
        for scorer, (_, block) in zip(scorers[1:], blocks[1:], strict=True):
            out += scorer(block)
        return
    scores = sum(scorer(block) for scorer, (_, block) in zip(scorers, blocks, strict=True))
    assert isinstance(scores, Tensor)
    torch.stack([group.amax(dim=1) for group in scores.split(queries.sizes, dim=1)], dim=1, out=out)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Pass one of {', '.join(map(repr, choices))}.")
