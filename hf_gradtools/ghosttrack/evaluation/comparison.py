"""The fair comparison: which methods stand in it, what each gets to see, and which of them differ in one thing only.

Shape letters: T texts, P features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_gradtools.ghosttrack.choices import FEATURES, default_classifier
from hf_gradtools.ghosttrack.evaluation.cross_validation import Method
from hf_gradtools.ghosttrack.evaluation.results import CrossValidation
from hf_gradtools.ghosttrack.evaluation.statistics import paired_difference
from hf_gradtools.ghosttrack.reading.reading import Reading
from hf_gradtools.ghosttrack.tracking.track_files import StoredTracks


__all__ = [
    "ABLATIONS",
    "ENLARGED",
    "LATENTS",
    "LATENTS_AND_TRACKS",
    "ONE_LAYER",
    "PROBE",
    "SEED",
    "ablation_rows",
    "baseline_methods",
    "detector_methods",
]

PROBE = "linear probe (SAPLMA)"
SEED = "seed's tracks"
ENLARGED = "enlarged tracks"
ONE_LAYER = "SAE latents, one layer"
LATENTS = "SAE latents, all layers"
LATENTS_AND_TRACKS = "SAE latents + tracks"
SCALARS = "all scalars together"
SCALAR_NAMES = {
    "answer_characters": "answer length",
    "mean_logprob": "mean log-probability",
    "perplexity": "perplexity",
    "p_true": "P(True)",
    "semantic_entropy": "semantic entropy",
}
NULL_NAMES = {"shuffled": "shuffled association", "random": "random association", "none": "no tracking"}
ABLATIONS = (
    *((SEED, f"{SEED}, {name}") for name in NULL_NAMES.values()),
    *((ENLARGED, f"{ENLARGED}, {name}") for name in NULL_NAMES.values()),
    (LATENTS, ONE_LAYER),
    (LATENTS_AND_TRACKS, LATENTS),
    (LATENTS_AND_TRACKS, PROBE),
    (LATENTS, PROBE),
)
"""Pairs of methods of which the second lacks something, or is what has to be beaten."""


def baseline_methods(reading: Reading, scalars: Mapping[str, np.ndarray]) -> list[Method]:
    """What a detector has to beat.

    Each scalar is a method by itself; all together go to a logistic regression. The probe is one on the hidden states
    of one layer, at the answer's last token or their mean, of which the inner cross-validation takes the best
    (SAPLMA, Azaria and Mitchell, arXiv 2304.13734, with a linear classifier).

    Args:
        reading ([`Reading`]): with hidden states.
        scalars (`Mapping[str, array [T]]`): by the names of `answer_scalars.py`.
    """
    methods = [
        Method(name, scalars[column], classifier=None) for column, name in SCALAR_NAMES.items() if column in scalars
    ]
    if len(scalars) > 1:
        methods.append(Method(SCALARS, np.stack(list(scalars.values()), axis=1)))
    if reading.hidden:
        states = {
            f"{hookpoint}, {kind}": values for kind, by in reading.hidden.items() for hookpoint, values in by.items()
        }
        methods.append(Method(PROBE, states))
    return methods


def detector_methods(
    reading: Reading, tracks: Mapping[str, StoredTracks], classifiers: Mapping[str, str] | None = None
) -> list[Method]:
    """The detectors, and the seed's and the enlarged track features under each null.

    Args:
        reading ([`Reading`]): of T texts.
        tracks (`Mapping[str, StoredTracks]`): by association, the real one first.
        classifiers (`Mapping[str, str]`, *optional*): feature set of a `DetectorConfig` -> name of a classifier; by
            default [`default_classifier`].
    """
    from scipy.sparse import csr_matrix, hstack

    kinds = {**{features: default_classifier(features) for features in FEATURES}, **(classifiers or {})}
    latents = hstack([reading.pooled[name] for name in reading.hookpoints], format="csr")
    methods = [Method(LATENTS, latents, kinds["latents"])]
    if len(reading.hookpoints) > 1:
        methods.append(Method(ONE_LAYER, dict(reading.pooled), kinds["latents"]))
    for number, (association, stored) in enumerate(tracks.items()):
        suffix = f", {NULL_NAMES.get(association, association)}" if number else ""
        for name, kind in ((SEED, "seed"), (ENLARGED, "enlarged")):
            classifier = kinds[f"tracks_{kind}"]
            methods.append(Method(name + suffix, stored.features[kind][0], classifier))
        if number == 0:
            both = hstack([latents, csr_matrix(stored.features["enlarged"][0])], format="csr")
            methods.append(Method(LATENTS_AND_TRACKS, both, kinds["latents+tracks"]))
    return methods


def ablation_rows(result: CrossValidation) -> list[dict[str, Any]]:
    """For each pair of [`ABLATIONS`] that was evaluated, AUROC of the first minus AUROC of the second, paired."""
    rows = []
    for full, without in ABLATIONS:
        if full not in result.scores or without not in result.scores:
            continue
        difference = paired_difference(
            result.labels,
            result.scores[full],
            result.scores[without],
            result.groups,
            strata=result.folds,
            resamples=result.resamples,
            confidence=result.confidence,
            seed=result.seed,
        )
        rows.append({"method": full, "minus": without, **asdict(difference)})
    return rows
