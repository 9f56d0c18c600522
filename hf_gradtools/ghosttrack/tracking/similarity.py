"""How alike hypotheses of neighbouring layers are, and what it costs to take one for the next step of the other.

The SAEs of two layers have bases of their own, so "the same feature" needs a definition. Three exist: the cosine of
the decoder vectors as they are (residual streams share most of their basis), the cosine after an orthogonal map from
one layer to the next (Procrustes), and, in `coactivation`, how often two features fire on the same tokens of a corpus.

Shape letters: T texts, K hypotheses of the left layer, J of the right one, F features, D width, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


__all__ = [
    "DecoderSimilarity",
    "Similarity",
    "activation_change",
    "association_cost",
    "from_table",
    "pairwise_cosine",
    "polar_factor",
    "position_distance",
    "procrustes",
    "worth_a_table",
]

TABLE_BYTES = 2**28  # an F x F' table of one pair of layers is made only below this
Lookup = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Similarity(Protocol):
    """Looks up how alike features of layer `i` and layer `i + 1` are."""

    def between(self, layer: int, lookups: int) -> Lookup:
        """The function from features `[T, K]` of `layer` and `[T, J]` of the next layer to similarities `[T, K, J]`.

        Args:
            layer: the left layer's place in the list.
            lookups: how many values will be asked for in all; decides whether a whole table is worth its making.
        """


# ---- cost


def activation_change(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`|a - b| / max(a, b)` of activations `[..., K]` and `[..., J]` -> `[..., K, J]` in [0, 1]; 0 if both are 0."""
    left, right = left[..., :, None], right[..., None, :]
    largest = np.maximum(left, right)
    return np.abs(left - right) / np.where(largest > 0, largest, 1)


def position_distance(left: np.ndarray, right: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`|p - q| / (length - 1)` of positions `[T, K]` and `[T, J]` -> `[T, K, J]` in [0, 1]; 0 in one-token texts."""
    span = np.maximum(lengths - 1, 1).astype(np.float32)
    return np.abs(left[:, :, None] - right[:, None, :]).astype(np.float32) / span[:, None, None]


def association_cost(
    similarity: np.ndarray, change: np.ndarray, distance: np.ndarray, weights: Sequence[float] = (0.6, 0.2, 0.2)
) -> np.ndarray:
    """`w0 (1 - similarity) + w1 change + w2 distance`, all `[T, K, J]`.

    Source: GhostTrack's cost, with the weights 0.6, 0.2, 0.2. The similarity is a cosine and may be negative.
    """
    return weights[0] * (1 - similarity) + weights[1] * change + weights[2] * distance


# ---- decoder vectors


def pairwise_cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of rows of `[..., K, D]` and `[..., J, D]` -> `[..., K, J]`; 0 for a row of zeros."""
    return left @ np.swapaxes(right, -1, -2) / (_norms(left)[..., :, None] * _norms(right)[..., None, :])


class DecoderSimilarity:
    """Cosine of decoder vectors, those of the left layer transported by a map first if there are maps.

    Args:
        decoders (`list[np.ndarray]` of `[F, D]`): the `W_dec` of each layer; F may differ, D too where there are maps.
        maps (`list[np.ndarray]` of `[D, D']`, *optional*): for each pair of layers what a row vector of the left layer
            is multiplied by to be one of the right layer, as [`procrustes`] gives.

    T texts cost `2 T K J D` FLOPs by gathered rows, or `2 F F' D` once for a table of all pairs of features. The
    cheaper one is done.

    Raises:
        ValueError: decoders or maps do not fit each other.
    """

    def __init__(self, decoders: Sequence[np.ndarray], maps: Sequence[np.ndarray] | None = None) -> None:
        self.decoders = [np.asarray(decoder, np.float32) for decoder in decoders]
        self.maps = None if maps is None else [np.asarray(map_, np.float32) for map_ in maps]
        for i, decoder in enumerate(self.decoders):
            if decoder.ndim != 2:
                raise ValueError(f"decoders[{i}] has shape {decoder.shape}; need [F, D]. Pass each layer's sae.W_dec.")
        if self.maps is not None and len(self.maps) != max(len(self.decoders) - 1, 0):
            raise ValueError(
                f"maps has {len(self.maps)} entries for {len(self.decoders)} decoders; need one per pair of layers. "
                "Pass maps=[procrustes(states[i], states[i + 1]) for i in range(len(decoders) - 1)]."
            )
        for i in range(len(self.decoders) - 1):
            self._check_pair(i)

    def _check_pair(self, i: int) -> None:
        left, right = (decoder.shape[1] for decoder in self.decoders[i : i + 2])
        shape = (left, left) if self.maps is None else self.maps[i].shape
        if shape != (left, right):
            given = "there are no maps" if self.maps is None else f"maps[{i}] has shape {shape}"
            raise ValueError(
                f"decoders[{i}] and decoders[{i + 1}] have widths {left} and {right}, and {given}; need a map "
                f"[{left}, {right}] between them. Pass maps=[procrustes(...), ...]."
            )

    def between(self, layer: int, lookups: int) -> Lookup:
        left, right = self.decoders[layer], self.decoders[layer + 1]
        if self.maps is not None:
            left = left @ self.maps[layer]
        if worth_a_table(len(left), len(right), lookups):
            return from_table(pairwise_cosine(left, right))
        return lambda rows, columns: pairwise_cosine(left[rows], right[columns])


def procrustes(left: np.ndarray, right: np.ndarray, *, center: bool = True) -> np.ndarray:
    """The orthogonal R that takes paired rows to each other: least `||left R - right||`.

    Args:
        left (`np.ndarray` `[N, D]`): hidden states of a layer, of tokens or the means of texts.
        right (`np.ndarray` `[N, D']`): those of the next layer, of the same tokens or texts.
        center (`bool`, defaults to `True`): take the means off first; directions are transported, not points.

    Returns:
        `np.ndarray` `[D, D']`: orthonormal rows or columns, whichever are fewer.

    Raises:
        ValueError: the rows are no pairs, or not finite.

    Source: Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right) or not len(left):
        raise ValueError(
            f"left {left.shape} and right {right.shape} are no pairs of rows; need [N, D] and [N, D'] with N of at "
            "least 1. Pass hidden states of the same tokens."
        )
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("left or right holds NaN or infinity; need finite hidden states. Pass float32 states.")
    if center:
        left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    return polar_factor(left.T @ right)


def polar_factor(cross: np.ndarray) -> np.ndarray:
    """The orthogonal factor of `cross` `[D, D']`, the sum over pairs of outer products: all that Procrustes needs."""
    u, _, vt = np.linalg.svd(cross, full_matrices=False)
    return u @ vt


# ---- tables


def worth_a_table(n_left: int, n_right: int, lookups: int) -> bool:
    """Whether a table of all pairs of features is smaller than what will be looked up, and fits."""
    return n_left * n_right <= lookups and 4 * n_left * n_right <= TABLE_BYTES


def from_table(table: np.ndarray) -> Lookup:
    """Looks features up in a table `[F, F']`."""
    return lambda rows, columns: table[rows[:, :, None], columns[:, None, :]]


def _norms(rows: np.ndarray) -> np.ndarray:
    """Of each row; 1 for a row of zeros, so that it can be divided by."""
    norms = np.sqrt(np.einsum("...d,...d->...", rows, rows))
    return np.where(norms > 0, norms, 1)
