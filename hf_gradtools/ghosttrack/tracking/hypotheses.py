"""Hypotheses: the features that speak loudest in a text, layer by layer, and where in the text each peaks.

Shape letters: T texts, L layers, K hypotheses per layer, N tokens of all texts, F features, M active latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_gradtools.ghosttrack.array_files import read_arrays, write_arrays


__all__ = ["Hypotheses", "LayerHypotheses", "top_hypotheses", "top_hypotheses_dense"]

NONE = -1  # the feature of a slot that no hypothesis fills
ARRAYS = {"features": np.int64, "activations": np.float32, "positions": np.int64, "lengths": np.int64}
KIND = "hypotheses"


class LayerHypotheses(NamedTuple):
    """One layer's hypotheses: `features` and `positions` `[T, K]` int64, `activations` `[T, K]` float32."""

    features: np.ndarray
    activations: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Hypotheses:
    """Per text and layer the K features of largest activation, largest first.

    Args:
        features (`np.ndarray` `[T, L, K]` int64): which feature; -1 fills what is left of the K slots.
        activations (`np.ndarray` `[T, L, K]` float32): its largest activation over the text's positions; 0 where none.
        positions (`np.ndarray` `[T, L, K]` int64): the first position of that maximum, from the text's beginning;
            0 where none.
        lengths (`np.ndarray` `[T]` int64): tokens of each text.
        layers (`list[str]`): hookpoints, in the order of the model.

    Raises:
        ValueError: the shapes do not belong together, or a -1 stands before a feature.
    """

    features: np.ndarray
    activations: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    layers: list[str]

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        expected = (len(self.lengths), len(self.layers))
        for name in ("features", "activations", "positions"):
            shape = getattr(self, name).shape
            if len(shape) != 3 or shape[:2] != expected or shape != self.features.shape:
                raise ValueError(
                    f"{name} has shape {shape}; {expected[0]} lengths and {expected[1]} layers need "
                    f"[{expected[0]}, {expected[1]}, K], the same for all three arrays. Pass {name} of that shape."
                )
        if (self.valid[..., 1:] & ~self.valid[..., :-1]).any():
            raise ValueError("features has a -1 before a feature; empty slots come last. Move them to the end.")

    @property
    def valid(self) -> np.ndarray:
        """`[T, L, K]` bool: which slots hold a hypothesis."""
        return self.features >= 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, texts: Any) -> Hypotheses:
        """The chosen texts, by a slice or an array of indices or flags."""
        if isinstance(texts, (int, np.integer)):
            texts = slice(texts, texts + 1 or None)
        return Hypotheses(**{name: getattr(self, name)[texts] for name in ARRAYS}, layers=self.layers)

    def select_layers(self, layers: Sequence[str]) -> Hypotheses:
        """The hypotheses of some layers, in the order given.

        Raises:
            ValueError: a layer that is not among `layers` of these hypotheses.
        """
        unknown = [layer for layer in layers if layer not in self.layers]
        if unknown or not layers:
            raise ValueError(f"layers={list(layers)!r} is not a choice among {self.layers}. Pass some of those.")
        chosen = [self.layers.index(layer) for layer in layers]
        arrays = (self.features[:, chosen], self.activations[:, chosen], self.positions[:, chosen])
        return Hypotheses(*arrays, self.lengths, list(layers))

    @classmethod
    def from_layers(cls, by_layer: Mapping[str, LayerHypotheses], lengths: np.ndarray) -> Hypotheses:
        """Stacks what [`top_hypotheses`] gives for each hookpoint, in the mapping's order."""
        if not by_layer:
            raise ValueError("by_layer={} has no layer; need at least 1. Pass {'layers.5': top_hypotheses(...)}.")
        stacked = [np.stack(arrays, axis=1) for arrays in zip(*by_layer.values(), strict=True)]
        return cls(*stacked, lengths, list(by_layer))

    @classmethod
    def concatenate(cls, parts: Sequence[Hypotheses]) -> Hypotheses:
        """The texts of several parts with the same layers and K, one after the other."""
        if len({(tuple(part.layers), part.features.shape[2]) for part in parts}) != 1:
            found = sorted({f"{part.layers} with K={part.features.shape[2]}" for part in parts})
            raise ValueError(f"parts={found} differ in layers or K; need at least 1 part and all alike.")
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
        return cls(**arrays, layers=parts[0].layers)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a checksum, whole or not at all."""
        write_arrays(Path(path), KIND, {"layers": self.layers}, {name: getattr(self, name) for name in ARRAYS})

    @classmethod
    def load(cls, path: str | Path) -> Hypotheses:
        """Reads what [`save`][Hypotheses.save] wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist. Pass the path that Hypotheses.save wrote.")
        try:
            header, arrays = read_arrays(Path(path), KIND)
            return cls(**{name: arrays[name] for name in ARRAYS}, layers=header["layers"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged or holds no hypotheses ({error}). Make it again.") from error


def top_hypotheses(
    indices: np.ndarray, values: np.ndarray, offsets: np.ndarray, text_offsets: np.ndarray, k: int = 50
) -> LayerHypotheses:
    """The k features of largest max-over-positions activation of each text, from sparse latents.

    Ties go to the lower feature, and the position is the first one that has the maximum. Only positive latents count.
    One stable sort of the M latents by (text, feature), and one of the (text, feature) pairs by activation.

    Args:
        indices (`np.ndarray` `[M]`): the feature of each active latent, each once per token.
        values (`np.ndarray` `[M]`): its activation.
        offsets (`np.ndarray` `[N + 1]`): where each token's latents begin, as in `SparseLatents`.
        text_offsets (`np.ndarray` `[T + 1]`): where each text's tokens begin.
        k (`int`, defaults to 50): hypotheses per text; texts with fewer active features are filled up with -1.

    Raises:
        ValueError: offsets that do not fit, or latents that are not finite.
    """
    indices, offsets = np.asarray(indices, np.int64), np.asarray(offsets, np.int64)
    values, text_offsets = np.asarray(values, np.float32), np.asarray(text_offsets, np.int64)
    _check_offsets("offsets", offsets, len(values))
    _check_offsets("text_offsets", text_offsets, len(offsets) - 1)
    if len(indices) != len(values):
        raise ValueError(f"indices has {len(indices)} entries and values {len(values)}; need one index per value.")
    tokens = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return _top(tokens, indices, values, text_offsets, k)


def top_hypotheses_dense(latents: np.ndarray, text_offsets: np.ndarray, k: int = 50) -> LayerHypotheses:
    """[`top_hypotheses`] from dense latents `[N, F]`."""
    latents, text_offsets = np.asarray(latents, np.float32), np.asarray(text_offsets, np.int64)
    if latents.ndim != 2:
        raise ValueError(f"latents has shape {latents.shape}; need [N, F], a row per token of all texts.")
    _check_offsets("text_offsets", text_offsets, len(latents))
    tokens, features = np.nonzero(latents)
    return _top(tokens, features, latents[tokens, features], text_offsets, k)


def _top(
    tokens: np.ndarray, features: np.ndarray, values: np.ndarray, text_offsets: np.ndarray, k: int
) -> LayerHypotheses:
    """Latents in the order of their tokens -> hypotheses `[T, K]`."""
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k={k!r} is no number of hypotheses; need a whole number of at least 1. Pass k=50.")
    if not np.isfinite(values).all():
        raise ValueError("latents hold NaN or infinity; need finite values. Encode in float32 and check the SAE.")
    n_texts, positive = len(text_offsets) - 1, values > 0
    tokens, features, values = tokens[positive], features[positive], values[positive]
    texts = np.searchsorted(text_offsets, tokens, side="right") - 1
    width = int(features.max(initial=0)) + 1
    pairs, largest, tokens = _largest_of_each(texts * width + features, values, tokens)
    texts, features = np.divmod(pairs, width)
    order = np.lexsort((features, -largest, texts))
    ranks = np.arange(len(order)) - np.searchsorted(texts, texts)  # pairs are sorted, and so are their texts
    kept = ranks < k
    rows, slots, order = texts[kept], ranks[kept], order[kept]
    found = LayerHypotheses(
        np.full((n_texts, k), NONE, np.int64), np.zeros((n_texts, k), np.float32), np.zeros((n_texts, k), np.int64)
    )
    found.features[rows, slots] = features[order]
    found.activations[rows, slots] = largest[order]
    found.positions[rows, slots] = tokens[order] - text_offsets[rows]
    return found


def _largest_of_each(
    keys: np.ndarray, values: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys in order, each once, with its largest value and the first token that has it."""
    if not len(keys):
        return keys, values, tokens
    order = np.argsort(keys, kind="stable")
    keys, values, tokens = keys[order], values[order], tokens[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    largest = np.maximum.reduceat(values, starts)
    hits = np.flatnonzero(values == np.repeat(largest, np.diff(starts, append=len(keys))))
    return keys[starts], largest, tokens[hits[np.searchsorted(hits, starts)]]


def _check_offsets(name: str, offsets: np.ndarray, total: int) -> None:
    if (
        offsets.ndim != 1
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != total
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(
            f"{name}={np.array2string(offsets, threshold=6)} does not cut {total} entries into runs; need ascending "
            f"offsets from 0 to {total}. Pass {name}=np.concatenate([[0], np.cumsum(counts)])."
        )
