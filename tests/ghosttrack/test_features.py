"""Detection features of hand-made tracks, each recomputed here, and of random tracks by plain loops."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from statistics import fmean, pstdev

import numpy as np
import pytest

from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.track_features import detection_features
from hf_gradtools.ghosttrack.tracking.tracking import TrackingConfig, Tracks, track
from tests.ghosttrack.test_tracking import make


LAYERS = ["a", "b", "c"]


def tracks_from(*texts):
    """Tracks of texts of three layers and six slots.

    Each text is its length and, for each layer, a list of (activation, position, track, previous, similarity, cost).
    """
    shape = (len(texts), 3, 6)
    features, track_id, previous = (np.full(shape, -1) for _ in range(3))
    activations, positions, similarity, cost = (np.zeros(shape) for _ in range(4))
    for text, (_, *layers) in enumerate(texts):
        for layer, hypotheses in enumerate(layers):
            for slot, values in enumerate(hypotheses):
                features[text, layer, slot] = slot
                arrays = (activations, positions, track_id, previous, similarity, cost)
                for array, value in zip(arrays, values, strict=True):
                    array[text, layer, slot] = value
    lengths = np.array([length for length, *_ in texts])
    hypotheses = Hypotheses(features, activations, positions, lengths, LAYERS)
    return Tracks(hypotheses, track_id, previous, similarity, cost)


# A track through all layers (4, 2, 2), one of two (2, 0.5), one of one (2), one born at the end (6), and a hypothesis
# in no track (0.3), which must count nowhere.
MIXED = (
    5,
    [(4, 0, 0, -1, 0, 0), (2, 0, 1, -1, 0, 0), (2, 3, 2, -1, 0, 0)],
    [(2, 4, 0, 0, 0.9, 0.1), (0.5, 4, 1, 1, 0.5, 0.2), (0.3, 4, -1, -1, 0, 0)],
    [(6, 4, 3, -1, 0, 0), (2, 2, 0, 0, 0.7, 0.3)],
)
# One token, six equal hypotheses, of which two go on for a layer.
FADING = (
    1,
    [(1, 0, i, -1, 0, 0) for i in range(6)],
    [(1, 0, 0, 0, 1, 0), (0.9, 0, 1, 1, 1, 0)],
    [],
)
EMPTY = (1, [], [], [])

ENTROPY = [1.5 * math.log(2), -0.8 * math.log(0.8) - 0.2 * math.log(0.2), 2 * math.log(2) - 0.75 * math.log(3)]
FADING_ENTROPY = [math.log(6), math.log(1.9) - 0.9 / 1.9 * math.log(0.9), 0]

SEED = {
    "entropy_mean": (fmean(ENTROPY), fmean(FADING_ENTROPY)),
    "entropy_max": (max(ENTROPY), math.log(6)),
    "entropy_std": (pstdev(ENTROPY), pstdev(FADING_ENTROPY)),
    "entropy_final": (ENTROPY[2], 0),
    "births": (4, 6),
    "deaths": (2, 6),
    "birth_rate": (4 / 7, 6 / 8),
    "death_rate": (2 / 5, 6 / 8),
    "churn": ((1 + 2) / (3 + 2 + 2 + 2), 6 / (6 + 2 + 2 + 0)),
    "survival": (2 / 4, 0),
    "competition_mean": (fmean([2 / 4, 0.5 / 2, 2 / 6]), 1.9 / 3),
    "competition_max": (0.5, 1),
    "competition_std": (pstdev([2 / 4, 0.5 / 2, 2 / 6]), pstdev([1, 0.9, 0])),
    "competition_final": (1 / 3, 0),
    "competition_high_ratio": (0, 2 / 3),
    "stability_mean": ((0.75 + 0.25) / 2, 0.95),
    "stability_min": (0.25, 0.9),
    "stability_unstable_ratio": (1 / 2, 0),
    "dominance_mean": (fmean([4 / 8, 2 / 2.5, 6 / 8]), fmean([1 / 6, 1 / 1.9, 0])),
    "dominance_min": (0.5, 0),
    "dominance_final": (0.75, 0),
    "dominance_weak_ratio": (0, 2 / 3),
    "density_mean": (7 / 18, 8 / 18),
    "density_max": (1 / 2, 1),
    "density_std": (pstdev([3 / 6, 2 / 6, 2 / 6]), pstdev([1, 2 / 6, 0])),
    "density_concurrent_max": (2, 6),
}

# layer by layer, of MIXED
BY_LAYER = {
    "entropy": ENTROPY,
    "count": [3, 2, 2],
    "dominance": [0.5, 0.8, 0.75],
    "competition": [0.5, 0.25, 1 / 3],
    "births": [3, 0, 1],
    "deaths": [0, 1, 1],
    "mass": [math.log(9), math.log(3.5), math.log(9)],
    "peak": [math.log(5), math.log(3), math.log(7)],
    "similarity": [0, 0.7, 0.7],
    "cost": [0, 0.15, 0.3],
    "change": [0, (0.5 + 0.75) / 2, 0],
    "last_token": [0, 1, 6 / 8],
    "position": [(2 * 3 / 4) / 8, 1, (6 * 1 + 2 * 0.5) / 8],
}
LENGTHS = {
    "length_mean": 7 / 4,
    "length_max": 3,
    "length_share_from_1": 2 / 4,
    "length_share_from_2": 1 / 4,
    "length_share_from_3": 1 / 4,
    "length_share_from_5": 0,
    "length_share_from_9": 0,
    "length_share_from_17": 0,
}


def columns(tracks, feature_set="seed"):
    values, names = detection_features(tracks, feature_set)
    assert values.shape == (len(tracks), len(names))
    assert values.dtype == np.float64
    return dict(zip(names, values.T, strict=True))


@pytest.mark.parametrize("name", SEED)
def test_a_seed_feature_of_hand_made_tracks(name):
    assert columns(tracks_from(MIXED, FADING))[name].tolist() == pytest.approx(SEED[name], abs=1e-6)


@pytest.mark.parametrize("name", BY_LAYER)
def test_an_enlarged_feature_of_hand_made_tracks(name):
    found = columns(tracks_from(FADING, MIXED), "enlarged")
    assert [found[f"{name}@{layer}"][1] for layer in LAYERS] == pytest.approx(BY_LAYER[name], abs=1e-6)


def test_the_lengths_of_hand_made_tracks():
    found = columns(tracks_from(MIXED), "enlarged")
    assert {name: found[name][0] for name in LENGTHS} == pytest.approx(LENGTHS)


def test_the_tests_above_name_every_feature():
    assert set(columns(tracks_from(MIXED))) == set(SEED)
    assert len(SEED) == 26
    expected = {*SEED, *LENGTHS, *(f"{name}@{layer}" for name in BY_LAYER for layer in LAYERS)}
    assert set(columns(tracks_from(MIXED), "enlarged")) == expected


def test_a_text_without_hypotheses_has_zeros():
    found = columns(tracks_from(MIXED, EMPTY, FADING), "enlarged")
    assert {name for name, values in found.items() if values[1] != 0} == {"dominance_weak_ratio"}


@pytest.mark.parametrize("association", ["hungarian", "random", "none"])
@pytest.mark.parametrize("shape", [{}, {"longest": 1}, {"k": 1}, {"n_layers": 1}, {"n_texts": 0}])
def test_features_are_finite_and_do_not_depend_on_batches(association, shape):
    hypotheses, decoders = make(0, **{"n_texts": 25, **shape})
    tracks = track(hypotheses, decoders, TrackingConfig(association=association))
    values, _ = detection_features(tracks, "enlarged")
    assert np.isfinite(values).all()
    assert values.shape[0] == len(hypotheses)
    for start in range(0, len(tracks), 7):
        part, _ = detection_features(tracks[start : start + 7], "enlarged")
        assert np.allclose(part, values[start : start + 7], atol=1e-12)


# ---- random tracks by plain loops


def by_loop(tracks, text):
    """Some features of every family, from the tracks as people read them."""
    layers, paths = tracks.hypotheses.layers, [t.steps for t in tracks.of_text(text)]
    live = [[step for path in paths for step in path if step.layer == layer] for layer in layers]
    acts = [sorted((step.activation for step in steps), reverse=True) for steps in live]
    entropy = [-sum(a / sum(x) * math.log(a / sum(x)) for a in x) for x in acts]
    stability = [
        1 - fmean(abs(s.activation - t.activation) / max(s.activation, t.activation) for s, t in pairwise(p))
        for p in paths
        if len(p) > 1
    ]
    deaths = sum(path[-1].layer != layers[-1] for path in paths)
    late_births = sum(path[0].layer != layers[0] for path in paths)
    sides = sum(len(x) + len(y) for x, y in zip(live[:-1], live[1:], strict=True))
    return {
        "entropy_mean": fmean(entropy),
        "births": len(paths),
        "deaths": deaths,
        "churn": (late_births + deaths) / sides if sides else 0,
        "competition_mean": fmean(x[1] / x[0] if len(x) > 1 else 0 for x in acts),
        "stability_mean": fmean(stability) if stability else 0,
        "stability_min": min(stability, default=0),
        "dominance_mean": fmean(x[0] / sum(x) if x else 0 for x in acts),
        "density_concurrent_max": max(max(Counter(s.position for s in x).values(), default=0) for x in live),
    }


def test_features_of_random_tracks_equal_plain_loops():
    hypotheses, decoders = make(1, n_texts=40, k=6)
    tracks = track(hypotheses, decoders)
    found = columns(tracks)
    for text in range(len(tracks)):
        expected = by_loop(tracks, text)
        assert {name: found[name][text] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_an_unknown_feature_set_is_named():
    with pytest.raises(ValueError, match="feature_set='all'.*'enlarged'"):
        detection_features(tracks_from(MIXED), "all")
