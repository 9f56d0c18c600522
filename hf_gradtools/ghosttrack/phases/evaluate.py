"""Phase 5: the fair comparison on each data set, to `<results_dir>/evaluation/<data set>`.

scalars.safetensors                 length, log-probability, P(True), ... of the answers
methods/00-answer-length.json, ...  out-of-fold scores of each method, as soon as it is done
evaluation.json  evaluation.md  dashboard.html  finished.json
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from hf_gradtools.core.atomic import atomic_write, write_json_atomically
from hf_gradtools.ghosttrack.phases.common import (
    Layers,
    PhaseSummary,
    begin,
    finish,
    hookpoints_of,
    is_finished,
    remove,
    results_folder,
)
from hf_gradtools.ghosttrack.phases.scalars import answer_scalars_of
from hf_gradtools.ghosttrack.phases.track import TrackedData, load_tracked


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.evaluation.cross_validation import Method
    from hf_gradtools.ghosttrack.evaluation.results import CrossValidation
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


__all__ = ["evaluate_detectors", "write_dashboards"]

logger = logging.getLogger(__name__)


def evaluate_detectors(config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Compares detectors and baselines by cross-validation that keeps questions whole; writes tables and a dashboard.

    Args:
        config ([`GhostTrackConfig`]): `evaluation`, and what phase 3 was given.
        layers (*optional*): some of the model's; by default `extraction.layers`.
        force (`bool`, defaults to `False`): compute again what is there.

    Returns:
        [`PhaseSummary`]: by data set, with the AUROC of each method.

    Raises:
        ValueError: phase 3 is not finished, there are too few questions for the folds, or what is there was made with
            other settings.
    """
    hookpoints = hookpoints_of(config, layers)
    folders = {name: results_folder(config.evaluation_folder, name, config, hookpoints) for name in config.datasets}
    if force:
        remove(*folders.values())
    done, skipped = [], []
    facts: dict[str, Any] = {"evaluation": str(config.evaluation_folder)}
    for name, folder in folders.items():
        data = load_tracked(config, hookpoints, name)
        identity = _identity(config, data)
        if is_finished(folder, identity):
            skipped.append(name)
            continue
        begin(folder, identity)
        (folder / "methods").mkdir(exist_ok=True)
        result = _compare(config, data, folder, identity)
        _write(config, data, result, folder)
        finish(folder, identity, {"texts": len(data.rows), "methods": list(result.scores)})
        done.append(name)
        facts |= {f"{name}, {row.method}": f"AUROC {row.auroc.estimate:.3f} [{row.auroc.low:.3f}, "
                  f"{row.auroc.high:.3f}]" for row in result.table}  # fmt: skip
    return PhaseSummary("evaluate", done, skipped, facts)


def write_dashboards(config: GhostTrackConfig, layers: Layers = None) -> list[Path]:
    """Writes the dashboards of a finished evaluation anew.

    Raises:
        ValueError: the evaluation is not finished, or was made with other settings.
    """
    hookpoints, paths = hookpoints_of(config, layers), []
    for name in config.datasets:
        folder = results_folder(config.evaluation_folder, name, config, hookpoints)
        data = load_tracked(config, hookpoints, name)
        identity = _identity(config, data)
        if not is_finished(folder, identity):
            raise ValueError(f"{folder} holds no finished evaluation. Run `hf-gradtools ghosttrack evaluate` first.")
        paths.append(_dashboard(config, data, _compare(config, data, folder, identity), folder))
    return paths


def _identity(config: GhostTrackConfig, data: TrackedData) -> dict[str, Any]:
    section = config.evaluation
    return {
        "tracked": data.identity,
        "classifiers": dict.fromkeys(config.detectors, config.detection.classifier),
        "folds": [section.folds, section.inner_folds, section.seed],
        "bootstrap": [section.bootstrap_samples, section.confidence],
        "baselines": section.baselines,
    }


def _compare(config: GhostTrackConfig, data: TrackedData, folder: Path, identity: dict[str, Any]) -> CrossValidation:
    """All methods on the same folds; those that an earlier run finished are read."""
    from hf_gradtools.ghosttrack.evaluation.comparison import baseline_methods, detector_methods

    classifier = config.detection.classifier
    classifiers = dict.fromkeys(config.detectors, classifier) if classifier else {}
    methods = detector_methods(data.reading, data.tracks, classifiers)
    if config.evaluation.baselines:
        methods = [*baseline_methods(data.reading, answer_scalars_of(config, data.rows, folder)), *methods]
    return _cross_validate(config, data, methods, folder, identity)


def _cross_validate(
    config: GhostTrackConfig,
    data: TrackedData,
    methods: Sequence[Method],
    folder: Path,
    identity: dict[str, Any],
) -> CrossValidation:
    from hf_gradtools.ghosttrack.evaluation.comparison import LATENTS, PROBE
    from hf_gradtools.ghosttrack.evaluation.cross_validation import cross_validate
    from hf_gradtools.ghosttrack.evaluation.folds import grouped_folds
    from hf_gradtools.ghosttrack.evaluation.results import CrossValidation

    section, rows = config.evaluation, data.rows
    fields: dict[str, dict[str, Any]] = {"scores": {}, "predicted": {}, "choices": {}}
    for number, method in enumerate(tqdm(methods, desc="Evaluating methods")):
        file = folder / "methods" / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', method.name.lower()).strip('-')}.json"
        found = _read_method(file, identity)
        if found is None:
            result = cross_validate(
                [method],
                rows.labels,
                rows.groups,
                n_folds=section.folds,
                inner_folds=section.inner_folds,
                seed=section.seed,
            )
            found = {name: getattr(result, name)[method.name] for name in fields}
            found = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}
            write_json_atomically(file, {"identity": identity, "method": method.name, **found})
            found = _read_method(file, identity) or found
        fields["scores"][method.name] = np.array(found["scores"], np.float64)
        fields["predicted"][method.name] = np.array(found["predicted"], np.int64)
        fields["choices"][method.name] = found["choices"]
        logger.info("evaluated %s", method.name)
    return CrossValidation(
        labels=rows.labels,
        groups=rows.groups,
        folds=grouped_folds(rows.labels, rows.groups, section.folds, section.seed),
        categories=rows.categories,
        **fields,
        baseline=PROBE if PROBE in fields["scores"] else LATENTS,
        resamples=section.bootstrap_samples,
        confidence=section.confidence,
        seed=section.seed,
    )


def _read_method(file: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A method's result, if there is one of these settings."""
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_bytes())
    return content if content["identity"] == json.loads(json.dumps(identity)) else None


def _write(config: GhostTrackConfig, data: TrackedData, result: CrossValidation, folder: Path) -> None:
    from hf_gradtools.ghosttrack.evaluation.comparison import ablation_rows

    ablations = ablation_rows(result)
    write_json_atomically(
        folder / "evaluation.json",
        {"data set": data.rows.name, "model": config.model.base_model, "ablations": ablations, **result.to_dict()},
    )
    with atomic_write(folder / "evaluation.md") as file:
        file.write(_markdown(config, data, result, ablations).encode())
    _dashboard(config, data, result, folder)


def _markdown(
    config: GhostTrackConfig, data: TrackedData, result: CrossValidation, ablations: Sequence[dict[str, Any]]
) -> str:
    layers = ", ".join(data.reading.hookpoints)
    lines = [f"# {data.rows.name}, {config.model.base_model}", "", f"Layers: {layers}.", "", result.to_markdown()]
    if ablations:
        lines += ["| method | minus | AUROC difference | interval | share below 0 |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['method']} | {row['minus']} | {row['estimate']:+.3f} | [{row['low']:+.3f}, {row['high']:+.3f}] | "
            f"{row['share_below_zero']:.3f} |"
            for row in ablations
        ]
    return "\n".join(lines) + "\n"


def _dashboard(config: GhostTrackConfig, data: TrackedData, result: CrossValidation, folder: Path) -> Path:
    from hf_gradtools.ghosttrack.phases.dashboard import dashboard_of

    return dashboard_of(config, data, result, folder / "dashboard.html")
