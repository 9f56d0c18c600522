"""Numbers that describe a text's tracks, for a classifier: GhostTrack's 26, and an enlarged set.

Every feature is defined for every text: one of a single token, without hypotheses or without tracks has zeros where
there is nothing to count. "Live" are the hypotheses that are in a track; their activations are what is measured. In
these definitions a layer's live activations are `a`, sorted `a(1) >= a(2) >= ...`; std is that of a population.

Shape letters: T texts, L layers, K hypotheses per layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hf_gradtools.ghosttrack.tracking.tracking import Tracks


__all__ = ["FEATURE_SETS", "LENGTH_BINS", "detection_features", "enlarged_features", "seed_features"]

HIGH_COMPETITION = 0.8
UNSTABLE = 0.5
WEAK_DOMINANCE = 0.2
LENGTH_BINS = (1, 2, 3, 5, 9, 17)  # a bin spans the track lengths from its number to below the next one

Columns = dict[str, np.ndarray]


def detection_features(tracks: Tracks, feature_set: str = "seed") -> tuple[np.ndarray, list[str]]:
    """The features of every text.

    Args:
        tracks (`Tracks`): of T texts.
        feature_set (`str`, defaults to `"seed"`): `"seed"`, see [`seed_features`], or `"enlarged"`, those and
            [`enlarged_features`].

    Returns:
        `np.ndarray` `[T, P]` float64 and the P names.

    Raises:
        ValueError: an unknown feature set.
    """
    if feature_set not in FEATURE_SETS:
        raise ValueError(
            f"feature_set={feature_set!r} is not known; need one of {list(FEATURE_SETS)}. Pass feature_set='seed'."
        )
    columns: Columns = {}
    for features in FEATURE_SETS[feature_set]:
        columns.update(features(tracks))
    return np.stack([np.asarray(column, np.float64) for column in columns.values()], axis=1), list(columns)


def seed_features(tracks: Tracks) -> Columns:
    """GhostTrack's 26 features, name -> `[T]`. The seed names them; what each is exactly is fixed here.

    Over layers:

    - `entropy_{mean,max,std,final}`: entropy in nats of a layer's activations as shares of their sum; 0 for less than
      two live. `final` is the last layer, here and below.
    - `competition_{mean,max,std,final}`: `a(2) / a(1)`, 0 for less than two live; `competition_high_ratio`: the share
      of layers above 0.8.
    - `dominance_{mean,min,final}`: `a(1) / sum(a)`, 0 for none live; `dominance_weak_ratio`: the share of layers
      below 0.2.
    - `density_{mean,max,std}`: the share of the K slots that are live; `density_concurrent_max`: the most live
      hypotheses of one layer that peak at the same token.

    Over tracks:

    - `births`: tracks; `deaths`: tracks that end before the last layer.
    - `birth_rate`: births per live hypothesis of all layers; `death_rate`: deaths per live hypothesis of all layers
      but the last, which are the occasions to die. 0 where there are none.
    - `churn`: births after the first layer and deaths, per live hypothesis on either side of a pair of neighbouring
      layers: 0 where every track goes through, 1 where none does.
    - `survival`: the share of tracks that are live at the last layer.
    - `stability_{mean,min}`: over the tracks of two layers or more, one minus the mean of `|a - b| / max(a, b)` over
      a track's steps; 0 where there is no such track. `stability_unstable_ratio`: the share of them below 0.5.
    """
    layers = _LayerValues(tracks)
    columns: Columns = {}
    columns.update(_over_layers("entropy", layers.entropy, ("mean", "max", "std", "final")))
    columns.update(_population(tracks))
    columns.update(_over_layers("competition", layers.competition, ("mean", "max", "std", "final")))
    columns["competition_high_ratio"] = (layers.competition > HIGH_COMPETITION).mean(axis=1)
    columns.update(_stability(tracks))
    columns.update(_over_layers("dominance", layers.dominance, ("mean", "min", "final")))
    columns["dominance_weak_ratio"] = (layers.dominance < WEAK_DOMINANCE).mean(axis=1)
    columns.update(_over_layers("density", layers.count / tracks.live.shape[2], ("mean", "max", "std")))
    columns["density_concurrent_max"] = _concurrent(tracks)
    return columns


def enlarged_features(tracks: Tracks) -> Columns:
    """Values layer by layer, named `<name>@<layer>`, and the lengths of tracks; name -> `[T]`.

    - `entropy`, `competition`, `dominance`: as in [`seed_features`]; `count`: live hypotheses; `births`, `deaths`:
      tracks that begin at the layer, and tracks of the layer before that are not there.
    - `mass`: `log(1 + sum(a))`; `peak`: `log(1 + a(1))`.
    - `similarity`, `cost`: mean over the hypotheses that go on with a track of what the match had; `change`: mean of
      their `|a - b| / max(a, b)`. 0 where there are none.
    - `last_token`: the share of the layer's activation whose hypotheses peak at the text's last token; `position`:
      the mean of their positions over `length - 1`, weighted by activation.
    - `length_mean`, `length_max`: layers that a track spans; `length_share_from_<n>`: the share of tracks with n
      layers or more, below the next of 1, 2, 3, 5, 9, 17. 0 without tracks.
    """
    layers, columns = _LayerValues(tracks), {}
    matched = tracks.previous >= 0
    by_layer = {
        "entropy": layers.entropy,
        "count": layers.count,
        "dominance": layers.dominance,
        "competition": layers.competition,
        "births": tracks.births,
        "deaths": tracks.deaths,
        "mass": np.log1p(layers.total),
        "peak": np.log1p(layers.largest),
        "similarity": _ratio((tracks.similarity * matched).sum(axis=2), matched.sum(axis=2)),
        "cost": _ratio((tracks.cost * matched).sum(axis=2), matched.sum(axis=2)),
        "change": _ratio(_changes(tracks).sum(axis=2), matched.sum(axis=2)),
        "last_token": layers.weighted_mean(_at_last_token(tracks)),
        "position": layers.weighted_mean(_relative_position(tracks)),
    }
    for name, values in by_layer.items():
        for i, layer in enumerate(tracks.hypotheses.layers):
            columns[f"{name}@{layer}"] = values[:, i]
    columns.update(_lengths(tracks))
    return columns


FEATURE_SETS: dict[str, tuple[Callable[[Tracks], Columns], ...]] = {
    "seed": (seed_features,),
    "enlarged": (seed_features, enlarged_features),
}


# ---- per layer


class _LayerValues:
    """`[T, L]` arrays of what the live activations of a layer are like."""

    def __init__(self, tracks: Tracks) -> None:
        self.activations = np.where(tracks.live, tracks.hypotheses.activations, 0).astype(np.float64)
        self.count = tracks.live.sum(axis=2)
        self.total = self.activations.sum(axis=2)
        self.largest = self.activations.max(axis=2, initial=0)
        self.dominance = _ratio(self.largest, self.total)
        second = -np.partition(-self.activations, 1, axis=2)[:, :, 1] if self.activations.shape[2] > 1 else 0
        self.competition = _ratio(np.broadcast_to(second, self.largest.shape), self.largest)
        shares = _ratio(self.activations, self.total[:, :, None])
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        self.entropy = np.maximum(-(shares * logs).sum(axis=2), 0)

    def weighted_mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of `[T, L, K]` over the live hypotheses, weighted by activation; 0 where none is live."""
        return _ratio((self.activations * values).sum(axis=2), self.total)


def _over_layers(name: str, values: np.ndarray, summaries: tuple[str, ...]) -> Columns:
    found = {
        "mean": values.mean(axis=1),
        "max": values.max(axis=1),
        "min": values.min(axis=1),
        "std": values.std(axis=1),
        "final": values[:, -1],
    }
    return {f"{name}_{summary}": found[summary] for summary in summaries}


def _concurrent(tracks: Tracks) -> np.ndarray:
    """`[T]`: the most live hypotheses of a layer at a position; other slots get negative ones of their own."""
    n_slots = tracks.live.shape[2]
    positions = np.where(tracks.live, tracks.hypotheses.positions, -1 - np.arange(n_slots))
    ordered = np.sort(positions, axis=2)
    slots = np.arange(n_slots)
    begins = np.concatenate([np.ones_like(ordered[:, :, :1], bool), ordered[:, :, 1:] != ordered[:, :, :-1]], axis=2)
    run = slots - np.maximum.accumulate(np.where(begins, slots, 0), axis=2) + 1
    return np.where(ordered >= 0, run, 0).max(axis=(1, 2), initial=0)


def _at_last_token(tracks: Tracks) -> np.ndarray:
    return tracks.hypotheses.positions == tracks.hypotheses.lengths[:, None, None] - 1


def _relative_position(tracks: Tracks) -> np.ndarray:
    span = np.maximum(tracks.hypotheses.lengths - 1, 1)
    return tracks.hypotheses.positions / span[:, None, None]


# ---- over tracks


def _population(tracks: Tracks) -> Columns:
    count, births, deaths = tracks.live.sum(axis=2), tracks.births, tracks.deaths
    n_births, n_deaths = births.sum(axis=1), deaths.sum(axis=1)
    either_side = count[:, :-1].sum(axis=1) + count[:, 1:].sum(axis=1)
    return {
        "births": n_births,
        "deaths": n_deaths,
        "birth_rate": _ratio(n_births, count.sum(axis=1)),
        "death_rate": _ratio(n_deaths, count[:, :-1].sum(axis=1)),
        "churn": _ratio(births[:, 1:].sum(axis=1) + n_deaths, either_side),
        "survival": _ratio(count[:, -1], n_births),
    }


def _changes(tracks: Tracks) -> np.ndarray:
    """`[T, L, K]`: `|a - b| / max(a, b)` of a hypothesis and the one whose track it goes on with; 0 without one."""
    activations = tracks.hypotheses.activations.astype(np.float64)
    before = np.concatenate([np.zeros_like(activations[:, :1]), activations[:, :-1]], axis=1)
    before = np.take_along_axis(before, np.maximum(tracks.previous, 0), axis=2)
    change = _ratio(np.abs(activations - before), np.maximum(activations, before))
    return np.where(tracks.previous >= 0, change, 0)


def _per_track(tracks: Tracks, values: np.ndarray) -> np.ndarray:
    """Sums `[T, L, K]` over the hypotheses of each track -> `[T, most tracks]`."""
    n_texts, width = len(tracks), int(tracks.n_tracks.max(initial=0))
    texts, layers, slots = np.nonzero(tracks.live)
    keys = texts * width + tracks.track_id[texts, layers, slots]
    sums = np.bincount(keys, values[texts, layers, slots], minlength=n_texts * width)
    return sums.reshape(n_texts, width)


def _stability(tracks: Tracks) -> Columns:
    steps = _per_track(tracks, tracks.previous >= 0)
    stability = 1 - _ratio(_per_track(tracks, _changes(tracks)), steps)
    moving = steps > 0
    n_moving = moving.sum(axis=1)
    least = np.where(moving, stability, np.inf).min(axis=1, initial=np.inf)
    return {
        "stability_mean": _ratio((stability * moving).sum(axis=1), n_moving),
        "stability_min": np.where(n_moving > 0, least, 0),
        "stability_unstable_ratio": _ratio((moving & (stability < UNSTABLE)).sum(axis=1), n_moving),
    }


def _lengths(tracks: Tracks) -> Columns:
    lengths, n_tracks = tracks.track_lengths(), tracks.n_tracks
    columns = {"length_mean": _ratio(lengths.sum(axis=1), n_tracks), "length_max": lengths.max(axis=1, initial=0)}
    for first, end in zip(LENGTH_BINS, (*LENGTH_BINS[1:], np.inf), strict=True):
        inside = (lengths >= first) & (lengths < end)
        columns[f"length_share_from_{first}"] = _ratio(inside.sum(axis=1), n_tracks)
    return columns


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """`numerator / denominator`, 0 where the denominator is 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), 0)
