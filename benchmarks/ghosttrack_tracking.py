"""GhostTrack's tracking against the per-pair Python loop that research code has for it.

The loop keeps a list of track objects for each text, computes one cosine at a time, fills the cost matrix in two
nested loops and calls SciPy's assignment; the package computes the costs of a batch of texts at once. Both give the
same tracks, which is checked before anything is timed.

    OMP_NUM_THREADS=1 python benchmarks/ghosttrack_tracking.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from common import Variant, environment, markdown_table, time_interleaved
from scipy.optimize import linear_sum_assignment

from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.track_features import detection_features
from hf_gradtools.ghosttrack.tracking.tracking import TrackingConfig, track


NEEDED = 20  # times faster than the loop


@dataclass
class LoopTrack:
    """What the loop knows of a track: where it is, and the vector that it has there."""

    number: int
    slots: list[tuple[int, int]] = field(default_factory=list)
    activation: float = 0.0
    position: int = 0
    vector: np.ndarray | None = None


def make(args: argparse.Namespace) -> tuple[Hypotheses, list[np.ndarray]]:
    """Hypotheses of random texts of which most persist from layer to layer, and decoders that drift with depth."""
    rng = np.random.default_rng(args.seed)
    shape = (args.texts, args.layers, args.top_k)
    lengths = rng.integers(20, 200, args.texts)
    features = np.empty(shape, np.int64)
    for text in range(args.texts):
        everywhere = rng.permutation(args.features)[: 2 * args.top_k]
        for layer in range(args.layers):
            features[text, layer] = rng.permutation(everywhere)[: args.top_k]
    activations = -np.sort(-rng.exponential(1.0, shape).astype(np.float32), axis=2)
    positions = (rng.random(shape) * lengths[:, None, None]).astype(np.int64)
    decoder = rng.standard_normal((args.features, args.width), dtype=np.float32)
    decoders = [decoder]
    for _ in range(args.layers - 1):
        drift = 0.6 * rng.standard_normal(decoder.shape, dtype=np.float32)
        decoders.append(decoders[-1] + drift)
    layers = [f"layers.{i}" for i in range(args.layers)]
    return Hypotheses(features, activations, positions, lengths, layers), decoders


def track_by_loop(hypotheses: Hypotheses, decoders: list[np.ndarray], config: TrackingConfig) -> np.ndarray:
    """`track_id` `[T, L, K]`, a text and a pair at a time."""
    track_id = np.full(hypotheses.features.shape, -1)
    for text in range(len(hypotheses)):
        tracks: list[LoopTrack] = []
        live: list[LoopTrack] = []
        for layer in range(len(hypotheses.layers)):
            live = _step_by_loop(hypotheses, decoders[layer], config, text, layer, live, tracks)
        for one in tracks:
            for layer, slot in one.slots:
                track_id[text, layer, slot] = one.number
    return track_id


def _step_by_loop(
    hypotheses: Hypotheses,
    decoder: np.ndarray,
    config: TrackingConfig,
    text: int,
    layer: int,
    live: list[LoopTrack],
    tracks: list[LoopTrack],
) -> list[LoopTrack]:
    """Associates one layer of one text; returns the tracks that are live there, and adds the new ones to `tracks`."""
    found = []
    for slot, feature in enumerate(hypotheses.features[text, layer]):
        if feature >= 0:
            activation, position = (x[text, layer, slot] for x in (hypotheses.activations, hypotheses.positions))
            found.append((slot, float(activation), int(position), decoder[feature]))
    span = max(int(hypotheses.lengths[text]) - 1, 1)
    cost = np.zeros((len(live), len(found)))
    for i, one in enumerate(live):
        for j, (_, activation, position, vector) in enumerate(found):
            cosine = np.dot(one.vector, vector) / (np.linalg.norm(one.vector) * np.linalg.norm(vector))
            change = abs(one.activation - activation) / max(one.activation, activation)
            distance = abs(one.position - position) / span
            cost[i, j] = (
                config.similarity_weight * (1 - cosine)
                + config.activation_weight * change
                + config.position_weight * distance
            )
    taken = {j: live[i] for i, j in zip(*linear_sum_assignment(cost), strict=True) if cost[i, j] < config.accept}
    now = []
    for j, (slot, activation, position, vector) in enumerate(found):
        one = taken.get(j)
        if one is None:
            if activation <= config.birth:
                continue
            one = LoopTrack(len(tracks))
            tracks.append(one)
        one.slots.append((layer, slot))
        one.activation, one.position, one.vector = activation, position, vector
        now.append(one)
    return now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    hypotheses, decoders = make(args)
    config = TrackingConfig(top_k=args.top_k)
    tracks = track(hypotheses, decoders, config)
    assert np.array_equal(tracks.track_id, track_by_loop(hypotheses, decoders, config)), "the loop has other tracks"

    variants = {
        "per-pair loop": Variant(partial(track_by_loop, hypotheses, decoders, config)),
        "track": Variant(partial(track, hypotheses, decoders, config)),
        "detection_features, enlarged": Variant(partial(detection_features, tracks, "enlarged")),
    }
    times = time_interleaved(variants, args.rounds)
    loop = times["per-pair loop"]
    speed = {name: f"{1 / t.ratio(loop, 'wall'):.0f}" for name, t in times.items()}
    speed["detection_features, enlarged"] = "-"  # other work
    rows = [[name, f"{1e3 * min(t.wall) / args.texts:.2f}", speed[name]] for name, t in times.items()]
    print(
        f"{args.texts} texts, {args.layers} layers, K={args.top_k}, D={args.width}, F={args.features}: "
        f"{tracks.n_tracks.mean():.0f} tracks a text, {(tracks.track_lengths() > 1).sum(axis=1).mean():.0f} of them "
        "longer than a layer; equal tracks.\n"
    )
    print(markdown_table(["", "ms per text", "times the loop's speed"], rows))
    print("\n" + environment())
    ratio = 1 / times["track"].ratio(loop, "wall")
    assert ratio >= NEEDED, f"track is {ratio:.1f} times as fast as the loop; {NEEDED} are needed"


if __name__ == "__main__":
    main()
