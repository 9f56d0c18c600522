"""Tracks against a loop over texts and pairs, with assignments found by trying every permutation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.tracking import ASSOCIATIONS, TrackingConfig, TrackStep, track


WIDTH, FEATURES = 5, 9


def make(seed, n_texts=4, n_layers=4, k=4, longest=6):
    """Random hypotheses with empty slots, and decoders of several layers that are alike enough to match."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, n_texts)
    features = np.full((n_texts, n_layers, k), -1)
    activations, positions = np.zeros(features.shape, np.float32), np.zeros(features.shape, np.int64)
    for text, layer in np.ndindex(n_texts, n_layers):
        n = rng.integers(0, min(k, FEATURES) + 1)
        features[text, layer, :n] = rng.permutation(FEATURES)[:n]
        activations[text, layer, :n] = np.sort(rng.uniform(0.1, 2, n))[::-1]
        positions[text, layer, :n] = rng.integers(0, lengths[text], n)
    base = rng.standard_normal((FEATURES, WIDTH))
    decoders = [base + 0.4 * rng.standard_normal(base.shape) for _ in range(n_layers)]
    layers = [f"layers.{i}" for i in range(n_layers)]
    return Hypotheses(features, activations, positions, lengths, layers), decoders


# ---- the reference


def pair_cost(hypotheses, decoders, text, layer, i, j, config):
    f, g = (int(hypotheses.features[text, layer + step, slot]) for step, slot in ((0, i), (1, j)))
    a, b = (float(hypotheses.activations[text, layer + step, slot]) for step, slot in ((0, i), (1, j)))
    p, q = (int(hypotheses.positions[text, layer + step, slot]) for step, slot in ((0, i), (1, j)))
    u, v = decoders[layer][f].tolist(), decoders[layer + 1][g].tolist()
    dot = sum(x * y for x, y in zip(u, v, strict=True))
    cosine = dot / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))
    length = int(hypotheses.lengths[text])
    distance = abs(p - q) / (length - 1) if length > 1 else 0.0
    w = (config.similarity_weight, config.activation_weight, config.position_weight)
    return w[0] * (1 - cosine) + w[1] * abs(a - b) / max(a, b) + w[2] * distance


def best_assignment(rows, columns, cost):
    """Every one-to-one assignment of the shorter side, the cheapest of them."""
    if len(rows) <= len(columns):
        options = (list(zip(rows, chosen, strict=True)) for chosen in itertools.permutations(columns, len(rows)))
    else:
        options = (list(zip(chosen, columns, strict=True)) for chosen in itertools.permutations(rows, len(columns)))
    return min(options, key=lambda pairs: sum(cost[pair] for pair in pairs))


def greedy_assignment(rows, columns, cost):
    pairs = []
    for i, j in sorted(itertools.product(rows, columns), key=lambda pair: cost[pair]):
        if all(i != row and j != column for row, column in pairs):
            pairs.append((i, j))
    return pairs


def track_by_loop(hypotheses, decoders, config):
    """For each text its tracks in the order of birth, each a list of (layer, slot)."""
    result = []
    for text in range(len(hypotheses)):
        tracks, live = [], {}
        for layer in range(len(hypotheses.layers)):
            columns = [j for j, f in enumerate(hypotheses.features[text, layer]) if f >= 0]
            rows, going_on = sorted(live), {}
            if config.association == "feature_id":
                ids = {int(hypotheses.features[text, layer - 1, i]): i for i in rows}
                found = {j: ids.get(int(hypotheses.features[text, layer, j])) for j in columns}
                going_on = {j: i for j, i in found.items() if i is not None}
            elif config.association in ("hungarian", "greedy"):
                assignment = best_assignment if config.association == "hungarian" else greedy_assignment
                cost = {
                    (i, j): pair_cost(hypotheses, decoders, text, layer - 1, i, j, config)
                    for i in rows
                    for j in columns
                }
                going_on = {j: i for i, j in assignment(rows, columns, cost) if cost[i, j] < config.accept}
            now = {}
            for j in columns:
                if j in going_on:
                    now[j] = live[going_on[j]]
                    now[j].append((layer, j))
                elif config.association == "none" or hypotheses.activations[text, layer, j] > config.birth:
                    now[j] = [(layer, j)]
                    tracks.append(now[j])
            live = now
        result.append(tracks)
    return result


def as_lists(tracks):
    """`Tracks` in the form of `track_by_loop`, read from `track_id` alone."""
    result = []
    for ids in tracks.track_id:
        of_text = [[] for _ in range(ids.max(initial=-1) + 1)]
        for layer, slot in zip(*np.nonzero(ids >= 0), strict=True):
            of_text[ids[layer, slot]].append((int(layer), int(slot)))
        result.append(of_text)
    return result


# ---- equality


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    association=st.sampled_from(["hungarian", "greedy", "feature_id", "none"]),
    k=st.integers(1, 5),
    accept=st.sampled_from([0.3, 0.5, 2.0]),
)
def test_tracks_equal_a_loop_over_permutations(seed, association, k, accept):
    hypotheses, decoders = make(seed, k=k)
    config = TrackingConfig(association=association, accept=accept)
    assert as_lists(track(hypotheses, decoders, config)) == track_by_loop(hypotheses, decoders, config)


def test_the_random_cases_hold_matches_births_and_deaths_at_once():
    tracks = track(*make(0, n_texts=20))
    lengths = tracks.track_lengths()
    assert (lengths > 1).any()
    assert (tracks.births[:, 1:] > 0).any()
    assert (tracks.deaths > 0).any()
    assert (tracks.hypotheses.valid & ~tracks.live).any()


def test_births_deaths_and_lengths_follow_from_the_loop_s_tracks():
    hypotheses, decoders = make(3, n_texts=12)
    tracks, expected = track(hypotheses, decoders), track_by_loop(hypotheses, decoders, TrackingConfig())
    for text, of_text in enumerate(expected):
        lengths = [len(steps) for steps in of_text]
        assert tracks.track_lengths()[text][: len(lengths)].tolist() == lengths
        assert tracks.track_lengths()[text].sum() == sum(lengths)
        begins = [steps[0][0] for steps in of_text]
        ends = [steps[-1][0] + 1 for steps in of_text]
        assert tracks.births[text].tolist() == [begins.count(layer) for layer in range(4)]
        assert tracks.deaths[text].tolist() == [ends.count(layer) for layer in range(4)]
    assert tracks.n_tracks.tolist() == [len(of_text) for of_text in expected]


def test_cost_and_similarity_are_those_of_the_matched_pairs():
    hypotheses, decoders = make(4, n_texts=10)
    tracks = track(hypotheses, decoders)
    matched = np.argwhere(tracks.previous >= 0)
    assert len(matched) > 5
    for text, layer, slot in matched:
        i = tracks.previous[text, layer, slot]
        cost = pair_cost(hypotheses, decoders, text, layer - 1, i, slot, TrackingConfig())
        only_cosine = TrackingConfig(similarity_weight=1.0, activation_weight=0.0, position_weight=0.0)
        cosine = 1 - pair_cost(hypotheses, decoders, text, layer - 1, i, slot, only_cosine)
        assert tracks.cost[text, layer, slot] == pytest.approx(cost, abs=1e-5)
        assert tracks.similarity[text, layer, slot] == pytest.approx(cosine, abs=1e-5)
    assert not tracks.cost[tracks.previous < 0].any()


@pytest.mark.parametrize("association", list(ASSOCIATIONS))
def test_results_do_not_depend_on_batches_or_neighbours(association):
    hypotheses, decoders = make(5, n_texts=9)
    whole = track(hypotheses, decoders, TrackingConfig(association=association))
    batched = track(hypotheses, decoders, TrackingConfig(association=association, batch_texts=2))
    alone = track(hypotheses[6], decoders, TrackingConfig(association=association))
    assert np.array_equal(whole.track_id, batched.track_id)
    assert np.array_equal(whole[6].track_id, alone.track_id)
    assert np.allclose(whole.cost, batched.cost, atol=1e-6)


def test_a_table_of_all_pairs_gives_the_same_tracks():
    """With 60 texts the table is the cheaper way, with 2 the gathered rows are."""
    hypotheses, decoders = make(6, n_texts=60)
    whole = track(hypotheses, decoders)
    parts = [track(hypotheses[i : i + 2], decoders).track_id for i in range(0, 60, 2)]
    assert np.array_equal(whole.track_id, np.concatenate(parts))


# ---- associations at random


def test_random_matches_are_one_to_one_as_many_as_can_be_and_follow_the_seed():
    hypotheses, decoders = make(7, n_texts=30)
    first, second = (track(hypotheses, None, TrackingConfig(association="random", seed=seed)) for seed in (0, 1))
    for layer in range(1, 4):
        live, valid = first.live[:, layer - 1].sum(axis=1), hypotheses.valid[:, layer].sum(axis=1)
        assert np.array_equal((first.previous[:, layer] >= 0).sum(axis=1), np.minimum(live, valid))
    for text, layer in np.ndindex(30, 4):
        chosen = first.previous[text, layer][first.previous[text, layer] >= 0]
        assert len(set(chosen.tolist())) == len(chosen)
        assert layer == 0 or first.live[text, layer - 1, chosen].all()
    assert not np.array_equal(first.track_id, second.track_id)


def test_random_matches_are_uniform():
    """2000 texts of two tracks and two hypotheses: either pairing in half of them, within four standard errors."""
    features = np.tile([[[0, 1], [2, 3]]], (2000, 1, 1))
    activations = np.random.default_rng(0).uniform(0.6, 1.0, features.shape)
    hypotheses = Hypotheses(features, activations, 0 * features, np.ones(2000), ["a", "b"])
    tracks = track(hypotheses, None, TrackingConfig(association="random"))
    assert abs((tracks.previous[:, 1, 0] == 0).mean() - 0.5) < 4 * 0.5 / 2000**0.5


def test_shuffled_matches_are_as_many_as_the_assignment_accepts():
    hypotheses, decoders = make(8, n_texts=40, n_layers=2)
    real, shuffled = (track(hypotheses, decoders, TrackingConfig(association=a)) for a in ("hungarian", "shuffled"))
    assert np.array_equal((real.previous >= 0).sum(axis=2), (shuffled.previous >= 0).sum(axis=2))
    assert not np.array_equal(real.previous, shuffled.previous)


# ---- similarities


def test_transported_decoders_find_what_a_rotation_hid():
    hypotheses, decoders = make(9, n_layers=2, n_texts=20)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)))[0]
    turned = [decoders[0], decoders[1] @ rotation]
    plain = track(hypotheses, decoders)
    transported = track(hypotheses, turned, TrackingConfig(similarity="transported"), maps=[rotation])
    assert np.array_equal(plain.track_id, transported.track_id)
    assert not np.array_equal(plain.track_id, track(hypotheses, turned).track_id)


def test_coactivation_matches_the_features_that_fire_together():
    features, ones = np.array([[[0, 1, 2], [2, 1, 0]]]), np.ones((1, 2, 3))
    hypotheses = Hypotheses(features, ones, 0 * ones, np.array([1]), ["a", "b"])
    together = csr_matrix((np.ones(3, np.float32), ([0, 1, 2], [1, 0, 2])), shape=(3, 3))
    tracks = track(hypotheses, config=TrackingConfig(similarity="coactivation"), coactivation=[together])
    assert tracks.track_id[0].tolist() == [[0, 1, 2], [2, 0, 1]]


# ---- rules one by one, by hand


def by_hand(activations, features=None, lengths=(3,), **config):
    """One text whose decoders are the unit vectors, so that equal features cost the activation change alone."""
    activations = np.array(activations, np.float32)[None]
    features = (
        np.where(activations[0] > 0, np.arange(activations.shape[2]), -1)[None] if features is None else features
    )
    hypotheses = Hypotheses(features, activations, np.zeros_like(features), np.array(lengths), ["a", "b", "c"])
    return track(hypotheses, [np.eye(4)] * 3, TrackingConfig(**config))


def test_a_track_goes_on_below_the_birth_threshold_but_does_not_begin_there():
    tracks = by_hand([[1.0, 0.5], [0.4, 0.4], [0.3, 0.6]], features=np.array([[[0, 1], [0, 1], [0, 1]]]))
    assert tracks.track_id[0].tolist() == [[0, -1], [0, -1], [0, 1]]


def test_a_track_that_ended_does_not_come_back():
    tracks = by_hand([[1.0], [0.0], [1.0]])
    assert tracks.track_id[0].tolist() == [[0], [-1], [1]]
    assert tracks.deaths[0].tolist() == [0, 1, 0]


def test_a_pair_at_the_acceptance_is_refused():
    """Equal features of activations 1 and 0.5 cost 0.25 * 0.5."""
    config = {"activation_weight": 0.25, "birth": 0.2}
    assert by_hand([[1.0], [0.5], [0.25]], accept=0.126, **config).n_tracks.tolist() == [1]
    assert by_hand([[1.0], [0.5], [0.25]], accept=0.125, **config).n_tracks.tolist() == [3]


def test_people_read_tracks_as_steps():
    tracks = by_hand([[2.0, 1.0], [2.0, 0.0], [2.0, 0.0]])
    assert [(t.number, t.steps) for t in tracks.of_text(0)] == [
        (0, [TrackStep("a", 0, 2.0, 0), TrackStep("b", 0, 2.0, 0), TrackStep("c", 0, 2.0, 0)]),
        (1, [TrackStep("a", 1, 1.0, 0)]),
    ]


def test_texts_without_hypotheses_and_no_texts_have_no_tracks():
    empty = by_hand([[0.0], [0.0], [0.0]], lengths=(0,))
    assert empty.n_tracks.tolist() == [0]
    assert list(empty.of_text(0)) == []
    assert len(track(empty.hypotheses[:0], [np.eye(4)] * 3)) == 0
    assert track(empty.hypotheses[:0], [np.eye(4)] * 3).track_lengths().shape == (0, 0)


def test_only_the_strongest_are_tracked():
    hypotheses, decoders = make(2, k=5)
    assert track(hypotheses, decoders, TrackingConfig(top_k=2)).track_id.shape == (4, 4, 2)


# ---- bad input


@pytest.mark.parametrize(
    "field",
    [
        {"association": "best"},
        {"similarity": "l2"},
        {"top_k": 0},
        {"batch_texts": 1.5},
        {"seed": -1},
        {"accept": float("nan")},
        {"birth": -0.1},
    ],
)
def test_bad_settings_are_named(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.*Pass {name}="):
        TrackingConfig(**field)


def test_what_the_similarity_needs_is_named():
    hypotheses, decoders = make(1)
    with pytest.raises(ValueError, match="decoders=3 arrays.*need 4"):
        track(hypotheses, decoders[1:])
    with pytest.raises(ValueError, match="decoders=None"):
        track(hypotheses)
    with pytest.raises(ValueError, match="maps=None"):
        track(hypotheses, decoders, TrackingConfig(similarity="transported"))
    with pytest.raises(ValueError, match="coactivation=None.*need 3"):
        track(hypotheses, decoders, TrackingConfig(similarity="coactivation"))
    with pytest.raises(ValueError, match=r"decoders\[0\] has 3 features"):
        track(hypotheses, [decoder[:3] for decoder in decoders])
