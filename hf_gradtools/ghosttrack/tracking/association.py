"""Which live tracks and which hypotheses of the next layer belong together, for a batch of texts at once.

Each association takes [`Pairs`] and the cost below which a pair is accepted, and gives for each hypothesis the slot
of the track that it goes on with, `[B, K]`, or -1. Shape letters: B texts of a batch, K hypotheses per layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


__all__ = ["ASSOCIATIONS", "NONE", "Pairs"]

NONE = -1


@dataclass(frozen=True)
class Pairs:
    """The live tracks of one layer, and the hypotheses of the next.

    Args:
        live (`np.ndarray` `[B, K]` bool): slots of the left layer that are in a track.
        features (two `np.ndarray` `[B, K]`): of both layers; -1 fills what is left of the K slots of the right one.
        activations (two `np.ndarray` `[B, K]`): likewise.
        cost (`np.ndarray` `[B, K, K]`, *optional*): of taking a right slot for the next step of a left one.
        seed (`tuple[int, ...]`): what the draws at random follow from, besides the text's own hypotheses.
    """

    live: np.ndarray
    features: tuple[np.ndarray, np.ndarray]
    activations: tuple[np.ndarray, np.ndarray]
    cost: np.ndarray | None
    seed: tuple[int, ...]

    @property
    def valid(self) -> np.ndarray:
        """`[B, K]` bool: slots of the right layer that hold a hypothesis; they come first."""
        return self.features[1] >= 0


def _hungarian(pairs: Pairs, accept: float) -> np.ndarray:
    assign = _linear_sum_assignment()
    previous = np.full(pairs.valid.shape, NONE, np.int64)
    n_valid = pairs.valid.sum(axis=1)
    for text, live in enumerate(pairs.live):
        rows = np.flatnonzero(live)
        cost = pairs.cost[text, rows, : n_valid[text]]
        chosen, columns = assign(cost)
        kept = cost[chosen, columns] < accept
        previous[text, columns[kept]] = rows[chosen[kept]]
    return previous


def _greedy(pairs: Pairs, accept: float) -> np.ndarray:
    """One pair of every text at a time; ties go to the lower slot of the left layer, then of the right one."""
    previous = np.full(pairs.valid.shape, NONE, np.int64)
    cost = np.where(pairs.live[:, :, None] & pairs.valid[:, None, :], pairs.cost, np.inf)
    texts = np.arange(len(cost))
    while len(texts):
        rows, columns = np.divmod(cost[texts].reshape(len(texts), -1).argmin(axis=1), cost.shape[2])
        kept = cost[texts, rows, columns] < accept
        texts, rows, columns = texts[kept], rows[kept], columns[kept]
        previous[texts, columns] = rows
        cost[texts, rows] = cost[texts, :, columns] = np.inf
    return previous


def _feature_id(pairs: Pairs, accept: float) -> np.ndarray:
    left, right = pairs.features
    same = (left[:, :, None] == right[:, None, :]) & pairs.live[:, :, None] & pairs.valid[:, None, :]
    return np.where(same.any(axis=1), same.argmax(axis=1), NONE)


def _random(pairs: Pairs, accept: float) -> np.ndarray:
    return _drawn(pairs, np.minimum(pairs.live.sum(axis=1), pairs.valid.sum(axis=1)))


def _shuffled(pairs: Pairs, accept: float) -> np.ndarray:
    return _drawn(pairs, (_hungarian(pairs, accept) >= 0).sum(axis=1))


def _drawn(pairs: Pairs, counts: np.ndarray) -> np.ndarray:
    """So many pairs of each text at random, one to one."""
    previous = np.full(pairs.valid.shape, NONE, np.int64)
    for text, (count, generator) in enumerate(zip(counts, _generators(pairs), strict=True)):
        rows = generator.permutation(np.flatnonzero(pairs.live[text]))[:count]
        previous[text, generator.permutation(np.flatnonzero(pairs.valid[text]))[:count]] = rows
    return previous


def _none(pairs: Pairs, accept: float) -> np.ndarray:
    return np.full(pairs.valid.shape, NONE, np.int64)


ASSOCIATIONS = {
    "hungarian": _hungarian,
    "greedy": _greedy,
    "feature_id": _feature_id,
    "random": _random,
    "shuffled": _shuffled,
    "none": _none,
}


def _linear_sum_assignment() -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("association='hungarian' needs scipy; install it with `pip install scipy`.") from error
    return linear_sum_assignment


def _generators(pairs: Pairs) -> Iterator[np.random.Generator]:
    """One per text, from the seed and the text's own hypotheses: neighbours and empty slots change nothing."""
    for text in range(len(pairs.live)):
        fingerprint = 0
        for features, activations in zip(pairs.features, pairs.activations, strict=True):
            for array in (features, activations):
                kept = np.ascontiguousarray(array[text, features[text] >= 0])
                fingerprint = zlib.crc32(kept.tobytes(), fingerprint)
        yield np.random.default_rng([*pairs.seed, fingerprint])
