"""Tracks: hypotheses of one layer taken up by those of the next, through the depth of the model.

At the first layer every hypothesis stronger than `birth` begins a track. At each further layer the live tracks are
associated one to one with the hypotheses there; a hypothesis that got a track goes on with it, one that got none
begins its own if it is stronger than `birth`, and a track that got none ends.

Shape letters: T texts, L layers, K hypotheses per layer, B texts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_gradtools.ghosttrack.tracking.association import ASSOCIATIONS, NONE, Pairs
from hf_gradtools.ghosttrack.tracking.coactivation import CoactivationSimilarity
from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.similarity import (
    DecoderSimilarity,
    Similarity,
    activation_change,
    association_cost,
    position_distance,
)


__all__ = ["ASSOCIATIONS", "SIMILARITIES", "Track", "TrackStep", "TrackingConfig", "Tracks", "track"]

SIMILARITIES = ("decoder", "transported", "coactivation")


@dataclass(frozen=True)
class TrackingConfig:
    """How hypotheses become tracks. The defaults are GhostTrack's.

    Args:
        top_k (`int`, defaults to 50): hypotheses per text and layer; weaker ones that were stored are left out.
        association (`str`, defaults to `"hungarian"`): which live tracks and hypotheses belong together.

            - `"hungarian"`: the assignment of least total cost, of which the pairs below `accept` are kept.
            - `"greedy"`: again and again the cheapest pair that is left, while it is below `accept`.
            - `"feature_id"`: the same feature number in both layers.
            - `"random"`: as many pairs as there can be, drawn at random; none is refused.
            - `"shuffled"`: as many pairs as `"hungarian"` keeps, drawn at random: the null that births and deaths
              alone do not tell from the real thing.
            - `"none"`: every hypothesis is a track of its own, whatever its activation.
        similarity (`str`, defaults to `"decoder"`): `"decoder"`, `"transported"` (decoder after a map per pair of
            layers) or `"coactivation"`.
        similarity_weight (`float`, defaults to 0.6): of one minus the similarity in the cost.
        activation_weight (`float`, defaults to 0.2): of the relative activation change.
        position_weight (`float`, defaults to 0.2): of the position distance.
        accept (`float`, defaults to 0.5): pairs that cost this much or more are refused.
        birth (`float`, defaults to 0.5): activation above which a hypothesis begins a track.
        batch_texts (`int`, defaults to 64): texts whose cost matrices are in memory together. Changes no result.
        seed (`int`, defaults to 0): of `"random"` and `"shuffled"`; each text's draws follow from it and the text's
            own hypotheses, not from its neighbours.

    Raises:
        ValueError: a value out of its range.
    """

    top_k: int = 50
    association: str = "hungarian"
    similarity: str = "decoder"
    similarity_weight: float = 0.6
    activation_weight: float = 0.2
    position_weight: float = 0.2
    accept: float = 0.5
    birth: float = 0.5
    batch_texts: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("association", tuple(ASSOCIATIONS)), ("similarity", SIMILARITIES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not known; need one of {choices}. Pass {name}={choices[0]!r}.")
        for name, least in (("top_k", 1), ("batch_texts", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is no whole number of at least {least}. Pass {name}={least}.")
        for name in ("similarity_weight", "activation_weight", "position_weight", "accept", "birth"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0. Pass {name}=0.5, say.")

    @property
    def weights(self) -> tuple[float, float, float]:
        return self.similarity_weight, self.activation_weight, self.position_weight


class TrackStep(NamedTuple):
    """A track at one layer."""

    layer: str
    feature: int
    activation: float
    position: int


@dataclass(frozen=True)
class Track:
    """One track of one text: its number there, in the order of birth, and its steps from first layer to last."""

    number: int
    steps: list[TrackStep]


@dataclass(frozen=True)
class Tracks:
    """The tracks of many texts, as arrays over their hypotheses.

    Args:
        hypotheses (`Hypotheses`): what was tracked, cut to the K that were used.
        track_id (`np.ndarray` `[T, L, K]` int64): the track each hypothesis is in, numbered from 0 in each text in
            the order of birth; -1 for one in no track.
        previous (`np.ndarray` `[T, L, K]` int64): the slot of the layer before whose track it goes on with; -1 where
            it began one or is in none.
        similarity (`np.ndarray` `[T, L, K]` float32): of the two; 0 where there is no previous one, or the
            association looked at no similarity and was given none.
        cost (`np.ndarray` `[T, L, K]` float32): likewise.
    """

    hypotheses: Hypotheses
    track_id: np.ndarray
    previous: np.ndarray
    similarity: np.ndarray
    cost: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """`[T, L, K]` bool: hypotheses that are in a track."""
        return self.track_id >= 0

    @property
    def born(self) -> np.ndarray:
        """`[T, L, K]` bool: hypotheses with which a track begins."""
        return self.live & (self.previous < 0)

    @property
    def births(self) -> np.ndarray:
        """`[T, L]`: tracks that begin at a layer; at the first one all that are there."""
        return self.born.sum(axis=2)

    @property
    def deaths(self) -> np.ndarray:
        """`[T, L]`: tracks of the layer before that are not at this one; 0 at the first layer."""
        alive = self.live.sum(axis=2)
        continued = (self.previous >= 0).sum(axis=2)
        return np.concatenate([np.zeros_like(alive[:, :1]), alive[:, :-1] - continued[:, 1:]], axis=1)

    @property
    def n_tracks(self) -> np.ndarray:
        """`[T]`: tracks of each text."""
        return self.births.sum(axis=1)

    def track_lengths(self) -> np.ndarray:
        """`[T, most tracks]`: how many layers each track spans, at its number; 0 beyond a text's last track."""
        n_texts, width = len(self.track_id), int(self.n_tracks.max(initial=0))
        texts, layers, slots = np.nonzero(self.live)
        keys = texts * width + self.track_id[texts, layers, slots]
        return np.bincount(keys, minlength=n_texts * width).reshape(n_texts, width)

    def __len__(self) -> int:
        return len(self.track_id)

    def __getitem__(self, texts: Any) -> Tracks:
        """The chosen texts, by a slice or an array of indices or flags."""
        if isinstance(texts, (int, np.integer)):
            texts = slice(texts, texts + 1 or None)
        arrays = (self.track_id, self.previous, self.similarity, self.cost)
        return Tracks(self.hypotheses[texts], *(array[texts] for array in arrays))

    def of_text(self, text: int) -> Iterator[Track]:
        """The tracks of one text in the order of birth, to be read by people."""
        hypotheses, ids = self.hypotheses, self.track_id[text]
        layers, slots = np.nonzero(ids >= 0)
        order = np.argsort(ids[layers, slots], kind="stable")
        layers, slots = layers[order], slots[order]
        ends = np.cumsum(np.bincount(ids[layers, slots]))  # numbers have no gaps
        for number, (start, end) in enumerate(zip(np.append(0, ends), ends, strict=False)):
            steps = []
            for layer, slot in zip(layers[start:end], slots[start:end], strict=True):
                arrays = (hypotheses.features, hypotheses.activations, hypotheses.positions)
                feature, activation, position = (array[text, layer, slot].item() for array in arrays)
                steps.append(TrackStep(hypotheses.layers[layer], feature, activation, position))
            yield Track(number, steps)


def track(
    hypotheses: Hypotheses,
    decoders: Sequence[np.ndarray] | None = None,
    config: TrackingConfig | None = None,
    *,
    maps: Sequence[np.ndarray] | None = None,
    coactivation: Sequence[Any] | None = None,
) -> Tracks:
    """Tracks the hypotheses of every text through the layers.

    Args:
        hypotheses (`Hypotheses`): of T texts.
        decoders (`list[np.ndarray]` of `[F, D]`, *optional*): `W_dec` of each layer, for the similarities `"decoder"`
            and `"transported"`.
        config (`TrackingConfig`, *optional*): the seed's settings if not given.
        maps (`list[np.ndarray]`, *optional*): for `"transported"`, see [`DecoderSimilarity`].
        coactivation (`list[csr_matrix]`, *optional*): for `"coactivation"`, see [`CoactivationSimilarity`].

    Returns:
        [`Tracks`]. `"feature_id"`, `"random"` and `"none"` need no similarity; the first two report it when they can.

    Raises:
        ValueError: what the similarity needs is missing, or does not fit the layers.

    Cost: per text and pair of layers `2 K² D` FLOPs for cosines and one assignment of K by K.
    """
    config = config or TrackingConfig()
    hypotheses = _strongest(hypotheses, config.top_k)
    similarity = _similarity(hypotheses, config, decoders, maps, coactivation)
    tracks = Tracks(
        hypotheses,
        *(np.full(hypotheses.features.shape, NONE, np.int64) for _ in range(2)),
        *(np.zeros(hypotheses.features.shape, np.float32) for _ in range(2)),
    )
    next_id = np.zeros(len(hypotheses), np.int64)
    lookups = len(hypotheses) * hypotheses.features.shape[2] ** 2
    for layer in range(len(hypotheses.layers)):
        if layer:
            look_up = similarity.between(layer - 1, lookups) if similarity else None
            for start in range(0, len(hypotheses), config.batch_texts):
                _associate(tracks, layer, slice(start, start + config.batch_texts), look_up, config)
        _number(tracks, layer, next_id, config)
    return tracks


def _strongest(hypotheses: Hypotheses, k: int) -> Hypotheses:
    arrays = (hypotheses.features, hypotheses.activations, hypotheses.positions)
    return Hypotheses(*(array[:, :, :k] for array in arrays), hypotheses.lengths, hypotheses.layers)


def _similarity(
    hypotheses: Hypotheses,
    config: TrackingConfig,
    decoders: Sequence[np.ndarray] | None,
    maps: Sequence[np.ndarray] | None,
    coactivation: Sequence[Any] | None,
) -> Similarity | None:
    """What the config asks for, checked against the hypotheses; None where none is asked for or given."""
    name = "coactivation" if config.similarity == "coactivation" else "decoders"
    given, n_layers = (coactivation if name == "coactivation" else decoders), len(hypotheses.layers)
    needed = n_layers - 1 if name == "coactivation" else n_layers
    if config.association == "none" or (given is None and config.association in ("feature_id", "random")):
        return None
    if given is None or len(given) != needed:
        raise ValueError(
            f"{name}={'None' if given is None else f'{len(given)} arrays'} does not fit {n_layers} layers with "
            f"similarity={config.similarity!r}; need {needed}. Pass {name}=[...], one per "
            f"{'pair of neighbouring layers' if name == 'coactivation' else 'layer'}."
        )
    if config.similarity == "transported" and maps is None:
        raise ValueError("maps=None, and similarity='transported' needs one per pair of layers. Pass procrustes(...).")
    for i, layer in enumerate(hypotheses.layers[: len(given)]):
        largest = int(hypotheses.features[:, i].max(initial=NONE))
        if largest >= given[i].shape[0]:
            raise ValueError(
                f"{name}[{i}] has {given[i].shape[0]} features, and the hypotheses of {layer} hold feature {largest}; "
                f"need the SAEs that made them. Pass {name} in the order of {hypotheses.layers}."
            )
    if name == "coactivation":
        return CoactivationSimilarity(given)
    return DecoderSimilarity(given, maps if config.similarity == "transported" else None)


def _number(tracks: Tracks, layer: int, next_id: np.ndarray, config: TrackingConfig) -> None:
    """Gives hypotheses of the layer the number of the track they go on with, or the next one where they begin it."""
    hypotheses, previous = tracks.hypotheses, tracks.previous[:, layer]
    ids, valid = tracks.track_id[:, layer], hypotheses.valid[:, layer]
    matched = previous >= 0
    if layer:
        before = np.take_along_axis(tracks.track_id[:, layer - 1], np.maximum(previous, 0), axis=1)
        ids[matched] = before[matched]
    born = valid & ~matched
    if config.association != "none":
        born &= hypotheses.activations[:, layer] > config.birth
    numbers = next_id[:, None] + np.cumsum(born, axis=1) - 1
    ids[born] = numbers[born]
    next_id += born.sum(axis=1)


def _associate(tracks: Tracks, layer: int, texts: slice, look_up: Any, config: TrackingConfig) -> None:
    """Fills `previous`, `similarity` and `cost` of one layer of a batch."""
    hypotheses = tracks.hypotheses
    (left, right), (a, b), (p, q) = (
        (array[texts, layer - 1], array[texts, layer])
        for array in (hypotheses.features, hypotheses.activations, hypotheses.positions)
    )
    similarity = cost = None
    if look_up is not None:
        similarity = look_up(np.maximum(left, 0), np.maximum(right, 0))
        distance = position_distance(p, q, hypotheses.lengths[texts])
        cost = association_cost(similarity, activation_change(a, b), distance, config.weights)
    pairs = Pairs(tracks.live[texts, layer - 1], (left, right), (a, b), cost, (config.seed, layer))
    previous = ASSOCIATIONS[config.association](pairs, config.accept)
    tracks.previous[texts, layer] = previous
    for values, found in ((tracks.similarity, similarity), (tracks.cost, cost)):
        if found is not None:
            chosen = np.take_along_axis(found, np.maximum(previous, 0)[:, None, :], axis=1)[:, 0]
            values[texts, layer] = np.where(previous >= 0, chosen, 0)
