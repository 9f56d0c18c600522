"""Phase 4: detectors fitted on all labelled answers, to `<results_dir>/detection/<data set>/<features>`.

Each is a folder that `HallucinationDetector.from_pretrained` and `pipeline("hallucination-detection")` load; its card
tells how detectors made like it did in cross-validation.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.ghosttrack.choices import default_classifier
from hf_gradtools.ghosttrack.phases.common import (
    Layers,
    PhaseSummary,
    finish,
    hookpoints_of,
    is_finished,
    remove,
    results_folder,
)
from hf_gradtools.ghosttrack.phases.track import TrackedData, load_saes, load_tracked, transport_maps


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
    from hf_gradtools.sae.modeling_sae import SAE


__all__ = ["detector_folder", "fit_detectors"]

logger = logging.getLogger(__name__)


def fit_detectors(config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Fits and saves a detector on each data set and each of `detection.features`.

    Args:
        config ([`GhostTrackConfig`]): `detection`, and what phase 3 was given.
        layers (*optional*): some of the model's; by default `extraction.layers`.
        force (`bool`, defaults to `False`): fit again what is there.

    Returns:
        [`PhaseSummary`]: by data set and features, with the AUROC in cross-validation.

    Raises:
        ValueError: phase 3 is not finished, there are too few questions for the folds, or what is there was made with
            other settings.
    """
    hookpoints = hookpoints_of(config, layers)
    done, skipped = [], []
    facts: dict[str, Any] = {"detectors": str(config.detection_folder)}
    for name in config.datasets:
        data, saes = load_tracked(config, hookpoints, name), None
        for features in config.detectors:
            folder = detector_folder(config, name, features, layers)
            if force:
                remove(folder)
            identity = _identity(config, data, features)
            if is_finished(folder, identity):
                skipped.append(f"{name} ({features})")
                continue
            saes = load_saes(config, hookpoints) if saes is None else saes
            auroc = _fit(config, data, saes, features, folder)
            finish(folder, identity, {"texts": len(data.rows), "auroc": auroc})
            done.append(f"{name} ({features})")
            facts[done[-1]] = f"AUROC {auroc:.3f} out of fold"
    return PhaseSummary("detect", done, skipped, facts)


def detector_folder(config: GhostTrackConfig, dataset: str, features: str, layers: Layers = None) -> Path:
    """Where a detector is saved."""
    folder = results_folder(config.detection_folder, dataset, config, hookpoints_of(config, layers))
    return folder / features.replace("+", "_and_")


def _fit(config: GhostTrackConfig, data: TrackedData, saes: Mapping[str, SAE], features: str, folder: Path) -> float:
    section, labels, groups = config.evaluation, data.rows.labels, data.rows.groups
    detector = _unfitted(config, data, saes, features)
    detector.fit(data.reading, labels, groups, inner_folds=section.inner_folds, seed=section.seed)
    result = detector.evaluate(
        data.reading,
        labels,
        groups,
        n_folds=section.folds,
        inner_folds=section.inner_folds,
        resamples=section.bootstrap_samples,
        confidence=section.confidence,
        seed=section.seed,
    )
    detector.save_pretrained(folder)
    return float(result.table[0].auroc.estimate)


def _unfitted(
    config: GhostTrackConfig, data: TrackedData, saes: Mapping[str, SAE], features: str
) -> HallucinationDetector:
    from transformers import AutoTokenizer

    from hf_gradtools.ghosttrack.detection.configuration_detector import DetectorConfig
    from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector

    tracking, section = config.tracking, config.detection
    maps = transport_maps(data.reading) if tracking.similarity == "transported" else None
    if tracking.similarity == "coactivation":
        if features != "latents":
            raise ValueError(
                f"tracking.similarity='coactivation' needs counts over a corpus, which a detector on {features!r} "
                "does not have. Write decoder or transported, or detection.features: latents."
            )
        logger.warning("the detector explains its verdicts by tracks of similarity 'decoder', not 'coactivation'")
        tracking = dataclasses.replace(tracking, similarity="decoder")
    template = data.rows.prompt_template  # so that questions asked later are put as those learnt from were
    detector_config = DetectorConfig(
        **({} if template is None else {"prompt_template": template}),
        model_name=config.model.base_model,
        model_revision=config.model.revision,
        hookpoints=list(saes),
        features=features,
        classifier=section.classifier or default_classifier(features),
        tracking=dataclasses.asdict(tracking),
        scope=section.scope,
        max_tokens=section.max_tokens,
        skip_first=section.skip_first,
    )
    revision = config.model.revision or "main"
    tokenizer = AutoTokenizer.from_pretrained(config.model.base_model, revision=revision)
    return HallucinationDetector(detector_config, saes, tokenizer=tokenizer, maps=maps)


def _identity(config: GhostTrackConfig, data: TrackedData, features: str) -> dict[str, Any]:
    section = config.evaluation
    return {
        "tracked": data.identity,
        "features": features,
        "classifier": config.detection.classifier,
        "folds": [section.folds, section.inner_folds, section.seed],
        "bootstrap": [section.bootstrap_samples, section.confidence],
    }
