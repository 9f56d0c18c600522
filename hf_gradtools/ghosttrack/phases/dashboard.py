"""The dashboard of an evaluation: its tables, and texts that show where the detector was right and wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_gradtools.ghosttrack.evaluation.comparison import (
    ENLARGED,
    LATENTS,
    LATENTS_AND_TRACKS,
    SEED,
    ablation_rows,
)
from hf_gradtools.ghosttrack.report.dashboard import write_dashboard
from hf_gradtools.ghosttrack.report.track_plot import points_of


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.evaluation.results import CrossValidation, MethodMetrics
    from hf_gradtools.ghosttrack.phases.track import TrackedData
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
    from hf_gradtools.ghosttrack.tracking.tracking import Tracks


__all__ = ["METHOD_OF", "choose_cases", "dashboard_of"]

METHOD_OF = {
    "latents": LATENTS,
    "tracks_seed": SEED,
    "tracks_enlarged": ENLARGED,
    "latents+tracks": LATENTS_AND_TRACKS,
}


def dashboard_of(config: GhostTrackConfig, data: TrackedData, result: CrossValidation, path: Path) -> Path:
    """Writes the dashboard of one data set."""
    method = METHOD_OF[config.detectors[0]]
    threshold = float(np.median([choice["threshold"] for choice in result.choices[method]]))
    scores, labels = result.scores[method], result.labels
    real = next(iter(data.tracks.values())).tracks
    chosen = choose_cases(labels, scores, threshold, config.evaluation.n_cases)
    differences = result.baseline_differences
    return write_dashboard(
        path,
        title=f"GhostTrack on {data.rows.name}",
        subtitle=f"{config.model.base_model}, {', '.join(data.reading.hookpoints)}",
        results=[_result(row, differences.get(row.method), row.method == method) for row in result.table],
        scores={name: (labels, result.scores[name]) for name in _ordered(result, method)},
        categories=[
            {
                "name": row.category,
                "auroc": row.auroc.estimate,
                "low": row.auroc.low,
                "high": row.auroc.high,
                "f1": row.f1,
                "n": row.rows,
            }
            for row in result.category_table
            if row.method == method
        ],  # fmt: skip
        ablations=_ablations(result),
        cases=[_case(data, real, row, float(scores[row])) for row in chosen],
        config=config.to_dict(),
        figures={"texts": len(labels), "questions": len(np.unique(result.groups)), "hallucinated": int(labels.sum())},
        notes=_notes(result),
        threshold=threshold,
        reference=result.baseline or "",
    )


def choose_cases(labels: np.ndarray, scores: np.ndarray, threshold: float, count: int) -> list[int]:
    """Rows to show, the surest first: found, missed, rightly passed and falsely accused ones in turn."""
    called = scores >= threshold
    queues = [
        [int(row) for row in np.argsort(order, kind="stable") if kind[row]]
        for kind, order in (
            (called & (labels == 1), -scores),
            (~called & (labels == 1), scores),
            (~called & (labels == 0), scores),
            (called & (labels == 0), -scores),
        )
    ]
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:count]


def _result(row: MethodMetrics, difference: Any, highlight: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"name": row.method, "auroc": row.auroc.estimate, "low": row.auroc.low,
                              "high": row.auroc.high, "highlight": highlight, "accuracy": row.accuracy,
                              "precision": row.precision, "recall": row.recall, "f1": row.f1}  # fmt: skip
    if difference is not None:
        values |= {
            "difference": difference.estimate,
            "difference_low": difference.low,
            "difference_high": difference.high,
        }
    return values


def _ablations(result: CrossValidation) -> list[dict[str, Any]]:
    by_name = {row.method: row for row in result.table}
    rows = []
    for entry in ablation_rows(result):
        without = by_name[entry["minus"]]
        rows.append({
            "name": without.method, "auroc": without.auroc.estimate, "low": without.auroc.low,
            "high": without.auroc.high, "difference": entry["estimate"], "difference_low": entry["low"],
            "difference_high": entry["high"], "note": f"difference: {entry['method']} minus this",
        })  # fmt: skip
    return rows


def _notes(result: CrossValidation) -> list[str]:
    """What holds and what does not, of the pairs that differ in one thing."""
    notes = []
    for row in ablation_rows(result):
        verdict = "better than" if row["low"] > 0 else "worse than" if row["high"] < 0 else "not told apart from"
        notes.append(
            f"{row['method']}: {verdict} {row['minus']} (AUROC {row['estimate']:+.3f}, {result.confidence:.0%} "
            f"interval {row['low']:+.3f} to {row['high']:+.3f})."
        )
    return notes


def _ordered(result: CrossValidation, first: str) -> list[str]:
    shown: Sequence[str] = [name for name in (LATENTS, LATENTS_AND_TRACKS, SEED, result.baseline) if name]
    return list(dict.fromkeys([first, *shown]))


def _case(data: TrackedData, tracks: Tracks, row: int, probability: float) -> dict[str, Any]:
    begin = int(data.rows.column("question_start", 0)[row])  # behind the examples, which are the same for all
    text, start = data.rows.texts[row][begin:], data.rows.answer_starts[row] - begin
    case: dict[str, Any] = {
        "text": text,
        "answer": text[start:],
        "answer_start": start,
        "label": int(data.rows.labels[row]),
        "probability": probability,
        "tracks": points_of(tracks, row)[0],
    }
    if data.rows.categories is not None:
        case["category"] = str(data.rows.categories[row])
    return case
