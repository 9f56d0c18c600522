"""Features of neighbouring layers that fire on the same tokens: counted over a corpus, kept sparse.

Shape letters: N tokens, F and F' features of the left and the right layer, M active latents of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradtools.ghosttrack.tracking.similarity import Lookup, from_table, worth_a_table


if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


__all__ = ["STATISTICS", "CoactivationCounts", "CoactivationSimilarity"]


class CoactivationCounts:
    """On how many tokens each feature of two layers fires, and each pair of them together.

    Args:
        n_left (`int`): features of the left layer.
        n_right (`int`): features of the right layer.

    A chunk costs `sum over tokens of k k'` additions for k and k' active latents of a token, and memory for the pairs
    that ever fired together.
    """

    def __init__(self, n_left: int, n_right: int) -> None:
        self.tokens = 0
        self.left = np.zeros(n_left, np.int64)
        self.right = np.zeros(n_right, np.int64)
        self.both = _sparse().csr_matrix((n_left, n_right), dtype=np.int32)

    def add(self, left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> None:
        """Counts a chunk of tokens.

        Args:
            left: indices `[M]` and offsets `[N + 1]` of the left layer's latents, as in `SparseLatents`.
            right: those of the right layer for the same N tokens.

        Raises:
            ValueError: the layers have different tokens, or a feature that is not of the layer.
        """
        fires_left, fires_right = _firing("left", *left, len(self.left)), _firing("right", *right, len(self.right))
        if fires_left.shape[0] != fires_right.shape[0]:
            raise ValueError(
                f"left has {fires_left.shape[0]} tokens and right {fires_right.shape[0]}; need the same tokens of "
                "both layers. Pass latents of one pass of the model."
            )
        self.tokens += fires_left.shape[0]
        self.left += np.asarray(fires_left.sum(axis=0)).ravel()
        self.right += np.asarray(fires_right.sum(axis=0)).ravel()
        self.both = self.both + fires_left.T @ fires_right

    def statistic(self, kind: str = "cosine", min_count: int = 1) -> csr_matrix:
        """A similarity in [0, 1] of every pair that fires together, sparse `[F, F']`; other pairs are 0.

        With the counts of N tokens, a of the left feature, b of the right one and c of both:

        - `"cosine"`: `c / sqrt(a b)`.
        - `"correlation"`: `(N c - a b) / sqrt(a (N - a) b (N - b))`; negative ones become 0, as do those of features
          that always fire.
        - `"npmi"`: `log(N c / (a b)) / log(N / c)`, pointwise mutual information over its bound; negative ones become
          0, and 1 where both fire on every token.

        Args:
            kind (`str`, defaults to `"cosine"`): which of them.
            min_count (`int`, defaults to 1): pairs that fire together less often than this are 0.

        Raises:
            ValueError: an unknown kind.
        """
        if kind not in STATISTICS:
            raise ValueError(f"kind={kind!r} is no statistic; need one of {list(STATISTICS)}. Pass kind='cosine'.")
        pairs = self.both.tocoo()
        kept = pairs.data >= min_count
        rows, columns, c = pairs.row[kept], pairs.col[kept], pairs.data[kept].astype(np.float64)
        a, b = self.left[rows].astype(np.float64), self.right[columns].astype(np.float64)
        values = STATISTICS[kind](a, b, c, self.tokens).astype(np.float32)
        result = _sparse().csr_matrix((values, (rows, columns)), shape=self.both.shape)
        result.eliminate_zeros()
        result.sort_indices()
        return result


def _cosine(a: np.ndarray, b: np.ndarray, c: np.ndarray, n: int) -> np.ndarray:
    return c / np.sqrt(a * b)


def _correlation(a: np.ndarray, b: np.ndarray, c: np.ndarray, n: int) -> np.ndarray:
    variance = a * (n - a) * b * (n - b)
    return np.maximum(n * c - a * b, 0) / np.sqrt(np.where(variance > 0, variance, np.inf))


def _npmi(a: np.ndarray, b: np.ndarray, c: np.ndarray, n: int) -> np.ndarray:
    always = c == n
    bound = np.where(always, 1, np.log(n / c))
    return np.where(always, 1, np.maximum(np.log(n * c / (a * b)), 0) / bound)


STATISTICS = {"cosine": _cosine, "correlation": _correlation, "npmi": _npmi}


class CoactivationSimilarity:
    """Similarities from one sparse statistic `[F, F']` per pair of layers.

    Args:
        statistics (`list[csr_matrix]`): as [`CoactivationCounts.statistic`] gives.

    A value is found by bisection among the pairs of the statistic, or in a table where that is smaller than the
    number of look-ups.
    """

    def __init__(self, statistics: Sequence[csr_matrix]) -> None:
        self.statistics = list(statistics)

    def between(self, layer: int, lookups: int) -> Lookup:
        statistic = self.statistics[layer]
        if worth_a_table(*statistic.shape, lookups):
            return from_table(statistic.toarray())
        pairs = statistic.tocoo()
        keys = pairs.row.astype(np.int64) * statistic.shape[1] + pairs.col
        order = np.argsort(keys, kind="stable")
        return _from_keys(keys[order], pairs.data[order], statistic.shape[1])


def _from_keys(keys: np.ndarray, values: np.ndarray, width: int) -> Lookup:
    """Values of pairs from their ascending keys `row * width + column`; 0 for a pair that is not among them."""

    def look_up(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        wanted = rows[:, :, None] * width + columns[:, None, :]
        if not len(keys):
            return np.zeros(wanted.shape, np.float32)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[found] == wanted, values[found], np.float32(0))

    return look_up


def _firing(name: str, indices: np.ndarray, offsets: np.ndarray, width: int) -> csr_matrix:
    """`[N, F]`, 1 where a feature fires."""
    indices, offsets = np.asarray(indices, np.int64), np.asarray(offsets, np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < width:
        raise ValueError(
            f"{name} has feature {indices.max()} (least: {indices.min()}) where the layer has {width}; need features "
            "of the layer's SAE. Pass its d_sae to CoactivationCounts."
        )
    ones = np.ones(len(indices), np.int32)
    return _sparse().csr_matrix((ones, indices, offsets), shape=(len(offsets) - 1, width))


def _sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError("co-activation statistics need scipy; install it with `pip install scipy`.") from error
    return sparse
