"""A self-contained HTML dashboard of a detector's evaluation: what it says is here, its look in `templates/`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.report.charts import (
    MISSING,
    SERIES,
    format_number,
    interval_plot,
    roc_curve,
    roc_plot,
    score_histogram,
)
from hf_gradtools.ghosttrack.report.track_plot import Track, plot_tracks


__all__ = ["plot_tracks", "write_dashboard"]

BOUNDS = ("low", "high")
KNOWN = {"name", "auroc", "difference", "highlight", "note"}
HEADS = {"auroc": "AUROC", "f1": "F1", "n": "texts"}
MAX_TEXT = 4000

Row = Mapping[str, Any]


def write_dashboard(
    output_path: str | os.PathLike[str],
    *,
    title: str,
    results: Sequence[Row],
    scores: Mapping[str, tuple[Any, Any]] | None = None,
    categories: Sequence[Row] = (),
    ablations: Sequence[Row] = (),
    cases: Sequence[Row] = (),
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    subtitle: str = "",
    layers: Sequence[int] | None = None,
    threshold: float = 0.5,
    reference: str = "",
) -> Path:
    """Writes one HTML file, without scripts or anything from the network, on how well hallucinations are found.

    A row of `results`, `categories` or `ablations` is a mapping with `name` and `auroc`, and, where known, `low` and
    `high` (the interval's ends), `difference` with `difference_low` and `difference_high` (paired, to the reference),
    `highlight` (bool), `note`, and any other number such as `accuracy`, `f1`, `n`, each of which becomes a column.

    Args:
        output_path (`str` or `os.PathLike`): the file to make; it appears whole or not at all.
        title (`str`): heading of the page.
        results (`Sequence[Mapping]`): a row per method, detectors and baselines.
        scores (`Mapping[str, tuple]`, *optional*): by method, (labels `[T]` of 0 or 1, scores `[T]`), for ROC curves
            and histograms; the first is drawn strongest, six at most.
        categories (`Sequence[Mapping]`, *optional*): a row per category of questions.
        ablations (`Sequence[Mapping]`, *optional*): a row per ablation.
        cases (`Sequence[Mapping]`, *optional*): case studies with `text`, `answer`, `label` (1 = hallucinated),
            `probability` and `tracks` as [`plot_tracks`] takes them; optional `answer_start` (offset of the answer in
            `text`), `category` and `note`.
        config (`Mapping`, *optional*): settings of the run, nested or not.
        figures (`Mapping[str, Any]`, *optional*): key figures of the top, such as `{"texts": 1634}`.
        notes (`Sequence[str]`, *optional*): sentences below the title: what holds and what does not.
        subtitle (`str`, *optional*): such as the model and the data set.
        layers (`Sequence[int]`, *optional*): of the track plots; by default each case's own.
        threshold (`float`, defaults to 0.5): probability from which an answer counts as hallucinated.
        reference (`str`, *optional*): the method that the differences of `results` are to.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: there are no results, a row or case lacks a needed key, or labels and scores do not fit.
    """
    if not results:
        raise ValueError("results has 0 rows; need at least 1 with 'name' and 'auroc'.")
    curves = {name: _checked_scores(name, *pair) for name, pair in list((scores or {}).items())[: len(SERIES)]}
    tables = {
        "results": _table(results, "results"),
        "categories": _table(categories, "categories"),
        "ablations": _table(ablations, "ablations"),
    }
    html = _template().render(
        title=title,
        subtitle=subtitle,
        reference=reference,
        notes=list(notes),
        created=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        figures={name: format_number(value) for name, value in (figures or {}).items()},
        tables=tables,
        plots={name: _intervals(rows) for name, rows in (("results", results), ("ablations", ablations)) if rows},
        roc=roc_plot({name: roc_curve(*pair) for name, pair in curves.items()}) if curves else None,
        histograms=[(name, score_histogram(*pair)) for name, pair in list(curves.items())[:2]],
        cases=[_case(case, i, layers, threshold) for i, case in enumerate(cases)],
        settings=_flatten(config or {}),
    )
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", errors="replace"))
    return path


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("dashboard.html.j2")


# Tables


def _table(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Heads and formatted cells: the estimate with its interval, the paired difference, then all other columns."""
    for i, row in enumerate(rows):
        _need(row, ("name", "auroc"), f"{name}[{i}]")
    special = {*KNOWN, *BOUNDS, "difference_low", "difference_high"}
    others = list(dict.fromkeys(key for row in rows for key in row if key not in special))
    compared = any(row.get("difference") is not None for row in rows)
    best = max((_number(row["auroc"]) for row in rows if math.isfinite(_number(row["auroc"]))), default=math.nan)
    return {
        "heads": [
            "AUROC",
            *["paired difference"] * compared,
            *(HEADS.get(key, key.replace("_", " ")) for key in others),
        ],
        "rows": [
            {
                "name": str(row["name"]),
                "note": row.get("note"),
                "highlight": bool(row.get("highlight")),
                "best": name == "results" and _number(row["auroc"]) == best,
                "cells": [
                    _interval(row, "auroc", *BOUNDS),
                    *[_interval(row, "difference", "difference_low", "difference_high", signed=True)] * compared,
                    *((format_number(row.get(key)), "", "") for key in others),
                ],
            }
            for row in rows
        ],
    }


def _interval(row: Row, key: str, low: str, high: str, signed: bool = False) -> tuple[str, str, str]:
    """(estimate, interval, verdict); the verdict, of differences, is whether 0 lies outside."""
    bounds = [_number(row.get(bound)) for bound in (low, high)]
    estimate = format_number(row.get(key), signed=signed)
    if not all(map(math.isfinite, bounds)) or estimate == MISSING:
        return estimate, "", ""
    shown = f"[{format_number(bounds[0], signed=signed)}, {format_number(bounds[1], signed=signed)}]"
    verdict = ("better" if bounds[0] > 0 else "worse" if bounds[1] < 0 else "includes 0") if signed else ""
    return estimate, shown, verdict


def _intervals(rows: Sequence[Row]) -> str | None:
    shown = []
    for row in rows:
        estimate, low, high = (_number(row.get(key)) for key in ("auroc", *BOUNDS))
        shown.append((str(row["name"]), estimate, low, high, bool(row.get("highlight"))))
    return interval_plot(shown) if len(shown) > 1 else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _need(row: Row, keys: Sequence[str], place: str) -> None:
    for key in keys:
        if key not in row:
            raise ValueError(
                f"{place} has no {key!r}, only {', '.join(map(str, row)) or 'nothing'}; need {', '.join(keys)}."
            )


def _checked_scores(name: str, labels: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    labels, values = np.asarray(labels), np.asarray(values, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != values.shape:
        raise ValueError(
            f"scores[{name!r}] has labels {labels.shape} and scores {values.shape}; need two of one length."
        )
    if set(np.unique(labels).tolist()) != {0, 1}:
        raise ValueError(f"scores[{name!r}] has labels {np.unique(labels).tolist()}; need both 0 and 1, and no other.")
    if not np.isfinite(values).all():
        raise ValueError(f"scores[{name!r}] has {int((~np.isfinite(values)).sum())} scores that are not finite.")
    return labels.astype(np.int64), values


# Cases and settings


def _case(case: Row, index: int, layers: Sequence[int] | None, threshold: float) -> dict[str, Any]:
    place = f"cases[{index}]"
    _need(case, ("text", "answer", "label", "probability", "tracks"), place)
    probability = float(case["probability"])
    if not 0 <= probability <= 1 or case["label"] not in (0, 1):
        raise ValueError(
            f"{place} has probability={probability} and label={case['label']!r}; need 0 to 1, and 0 or 1."
        )
    text, start = str(case["text"]), case.get("answer_start")
    start = len(text) if start is None else min(int(start), len(text))
    tracks: Sequence[Track] = case["tracks"]
    return {
        "prompt": _cut(text[:start]),
        "tail": _cut(text[start:]),
        "answer": _cut(str(case["answer"])),
        "in_text": start < len(text),
        "label": int(case["label"]),
        "category": case.get("category"),
        "note": case.get("note"),
        "percent": round(100 * probability),
        "right": (probability >= threshold) == bool(case["label"]),
        "plot": plot_tracks(tracks, layers=layers, title=f"Tracks of case {index + 1}"),
        "num_tracks": len(tracks),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT:,} more characters)"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with readable values."""
    pairs: list[tuple[str, str]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{prefix}{name}", ", ".join(map(str, value)) or MISSING))
        elif isinstance(value, float):
            pairs.append((f"{prefix}{name}", f"{value:g}"))
        else:
            pairs.append((f"{prefix}{name}", format_number(value)))
    return pairs
