"""Search by FAISS: a flat inner product index in memory, with the same scores as the exact search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .precondition import Scorer
from .queries import Queries


if TYPE_CHECKING:
    from .search import Searchable
    from .store import GradientStore


def faiss_search(
    target: Searchable, queries: Queries, scorer: Scorer, scaling: tuple[Any, ...], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(query, rank from 1, row, score) of the k best rows.

    Args:
        target: one store.
        queries: with reduce other than "max", which is no inner product.
        scorer: of the store.
        scaling: metric, preconditioner and damping, which the rows' scale depends on.
        k: rows for each query.

    Raises:
        ImportError: faiss is not installed.
        ValueError: the search is no inner product of one store.
    """
    if len(target.stores) > 1 or queries.reduce == "max":
        raise ValueError("backend='faiss' searches one store, with reduce=None or 'mean'. Pass backend='exact'.")
    store = target.stores[0]
    index = _index(store, scorer, scaling)
    scores, rows = index.search(scorer.weights.T.contiguous().numpy(), k)
    order = np.lexsort((rows, -scores), axis=1)
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    count = len(queries.names)
    return np.repeat(np.arange(count), k), np.tile(np.arange(1, k + 1), count), rows.ravel(), scores.ravel()


def _index(store: GradientStore, scorer: Scorer, scaling: tuple[Any, ...]) -> Any:
    """Built while the rows stream by; 4 * N * d bytes, kept with the store for searches with the same scale."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss' needs faiss. Install it with pip install 'hf_gradtools[faiss]', or pass backend='exact'."
        ) from error
    key = scaling if scorer.row_scale is not None else ()
    if key not in store.indexes:
        index = faiss.IndexFlatIP(store.dim)
        for _, block in store.blocks():
            rows = block if scorer.row_scale is None else block * scorer.row_scale(block)[:, None]
            index.add(rows.contiguous().numpy())
        store.indexes[key] = index
    return store.indexes[key]
