"""A self-contained HTML report on the data values of a run: what it says is here, its look in `templates/`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_gradtools.core.store import atomic_write
from hf_gradtools.ghost.charts import (
    MISSING,
    Chart,
    Labels,
    Unit,
    bar_chart,
    cell_edges,
    format_number,
    histogram,
    line_chart,
    thin,
)
from hf_gradtools.ghost.results import (
    GhostValues,
    Rows,
    column_names,
    column_suffix,
    ghost_values,
    group_rows,
    read_columns,
    validation_set_names,
)


__all__ = ["environment", "excerpt", "group_layers", "write_report"]

EXCERPT_CHARACTERS, TEXT_CHARACTERS = 240, 10_000
MAX_KINDS, MAX_STRONGEST, MAX_LISTED = 16, 10, 4
COVERAGE_TOLERANCE = 1e-3
ROWS_PER_READ = 10_000
STEP_COLUMNS = {"epoch": "max", "train_loss": "mean", "learning_rate": "mean", "residual": "max"}
CELLS = {"value": "value", "sample_loss": "mean loss", "grad_norm": "gradient norm"}

Steps = Mapping[str, np.ndarray]  # one entry per step: "step", the STEP_COLUMNS that exist, the sums of value columns


def write_report(
    dataset: Rows,
    output_path: str | os.PathLike[str],
    *,
    manifest: Mapping[str, Any],
    texts: Mapping[Any, str] | None = None,
    top_k: int = 20,
    title: str = "Which training samples helped?",
    highlights: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one HTML file, without scripts or anything from the network, that explains a run's data values.

    Args:
        dataset (`datasets.Dataset`): rows as the callback writes them.
        output_path (`str` or `os.PathLike`): the file to make; it appears whole or not at all.
        manifest (`Mapping[str, Any]`): manifest of the store. All that its `identity` and `extra` hold is shown;
            `identity["model"]` goes to the top and `identity["layers"]` names what `layer_dot_products` counts.
        texts (`Mapping[id, str]`, *optional*): text of each sample, by `sample_id`.
        top_k (`int`, defaults to 20): samples listed as most helpful and as most harmful.
        title (`str`): heading of the report.
        highlights (`Mapping[str, Any]`, *optional*): further key figures, such as `{"AUROC of values": 0.93}`.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: if the dataset has no rows or lacks needed columns, or the manifest is of another store.
    """
    suffixes = {name: column_suffix(dataset, name) for name in validation_set_names(dataset) or [""]}
    columns = {f"value{suffix}": "sum" for suffix in suffixes.values()}
    columns |= {name: how for name, how in STEP_COLUMNS.items() if name in column_names(dataset)}
    grouped = group_rows(dataset, "step", list(columns.items()))
    steps = {"step": grouped["step"], **{name: grouped[f"{name}_{how}"] for name, how in columns.items()}}
    identity = manifest.get("identity", {})
    sets = []
    for name, suffix in suffixes.items():
        layers = _layer_shares(dataset, f"layer_dot_products{suffix}", identity.get("layers"))
        sets.append(_validation_set(ghost_values(dataset, name), steps, f"value{suffix}", texts or {}, top_k, layers))
    html = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            model=identity.get("model"),
            made_by=_made_by(identity, list(suffixes)),
            created=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
            figures=_key_figures(sets[0]["num_samples"], dataset, steps),
            coverage=_coverage(steps),
            sets=sets,
            training=_training_charts(steps),
            highlights=highlights or {},
            settings=_settings({**identity, **manifest.get("extra", {}), **identity}),
        )
    )
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", errors="replace"))
    return path


def environment() -> Environment:
    """Of the templates, which escape all that they are given."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    return environment


# The run


def _made_by(identity: Mapping[str, Any], names: Sequence[str]) -> str:
    """One line on how the values were made, as far as the manifest says."""
    parts = [f"scored against {', '.join(names)}"]
    parts += [f"{name} {identity[name]}" for name in ("method", "scale") if name in identity]
    if (aware := identity.get("optimizer_aware")) is not None:
        parts.append(f"optimizer-aware{' (exact)' * (aware == 'exact')}" if aware else "not optimizer-aware")
    return " · ".join(parts)


def _key_figures(num_samples: int, dataset: Rows, steps: Steps) -> list[tuple[str, str]]:
    figures: list[tuple[str, float]] = [
        ("samples scored", num_samples),
        ("scores", len(dataset)),
        ("steps", len(steps["step"])),
    ]
    for name, label in (("epoch", "epochs"), ("train_loss", "final training loss"), ("residual", "largest residual")):
        series = steps.get(name, np.array([]))
        if len(series := series[np.isfinite(series)]):
            last = float(series.max() if name == "residual" else series[-1])
            figures.append((label, int(last) if last.is_integer() else last))
    return [(label, format_number(figure, 3)) for label, figure in figures]


def _coverage(steps: Steps) -> dict[str, Any]:
    """The self-check in plain words: do the samples' scores add up to the gradient that training used?"""
    residual = steps.get("residual", np.array([]))
    if not np.isfinite(residual).any():
        return {"kind": "unknown", "text": "No step has a coverage check, so nothing shows that the scores are whole."}
    worst = int(np.nanargmax(residual))
    where = f"largest gap {format_number(float(residual[worst]), 2)}, relative, at step {steps['step'][worst]:,}"
    unchecked = int((~np.isfinite(residual)).sum())
    tail = f" {unchecked:,} steps have no finite check." if unchecked else ""
    if residual[worst] > COVERAGE_TOLERANCE:
        text = f"The scores of a step's samples miss part of the gradient that training used ({where}). Some trained "
        return {"kind": "failed", "text": f"{text}parameters are not covered: read the values with care.{tail}"}
    text = f"The scores of each step's samples add up to the gradient that training used ({where})."
    return {"kind": "passed", "text": text + tail}


def _training_charts(steps: Steps) -> list[Chart]:
    titles = {"train_loss": Labels("Training loss", y="loss"), "learning_rate": Labels("Learning rate")}
    return [_line_over_steps(steps, steps[name], labels) for name, labels in titles.items() if name in steps]


def _settings(recorded: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest records, one readable line each."""
    lines = {}
    for name, setting in recorded.items():
        if isinstance(setting, bool):
            setting = "yes" if setting else "no"
        elif isinstance(setting, list | tuple):
            shown = ", ".join(map(str, setting[:MAX_LISTED]))
            setting = f"{shown}, … ({len(setting):,} in all)" if len(setting) > MAX_LISTED else shown
        lines[name.replace("_", " ").capitalize()] = MISSING if setting is None else str(setting)
    return lines


# One validation set


def _validation_set(
    values: GhostValues,
    steps: Steps,
    column: str,
    texts: Mapping[Any, str],
    top_k: int,
    layers: dict[str, Any] | None,
) -> dict[str, Any]:
    """All that the page shows about one validation set."""
    finite = values.value[np.isfinite(values.value)]
    helping, harming = finite[finite < 0], finite[finite > 0]
    per_step = Labels("Change by step", "sum of the values of each step's samples", y="value")
    so_far = Labels("Change so far", "the same, added up", y="value")
    return {
        "name": values.val,
        "num_samples": len(values),
        "share_helping": len(helping) / max(len(finite), 1),
        "num_helping": len(helping),
        "num_harming": len(harming),
        "sum_helping": float(helping.sum()),
        "sum_harming": float(harming.sum()),
        "total": float(finite.sum()),
        "tables": _sample_tables(values, texts, top_k),
        "distribution": histogram(
            finite, Labels("Values of the samples", "how many have which value", "value", "samples")
        ),
        "over_steps": [
            _bars_over_steps(steps, steps[column], per_step),
            _line_over_steps(steps, np.nancumsum(steps[column]), so_far, total=True),
        ],
        "layers": layers,
    }


def _sample_tables(values: GhostValues, texts: Mapping[Any, str], top_k: int) -> list[dict[str, Any]]:
    """The most helpful and the most harmful samples; numbers of one column share one unit."""
    helpful = [sample for sample in values.most_helpful(top_k) if sample["value"] < 0]
    harmful = [sample for sample in values.most_harmful(top_k) if sample["value"] > 0]
    listed = [*helpful, *harmful]
    units = {name: Unit.of([sample[name] for sample in listed]) for name in CELLS if name in values.columns()}
    largest = max((abs(sample["value"]) for sample in listed), default=1.0)

    def as_row(sample: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": sample["sample_id"],
            "text": excerpt(texts[sample["sample_id"]]) if sample["sample_id"] in texts else None,
            "bar": 100 * abs(sample["value"]) / largest,
            "cells": [unit.format(sample[name]) for name, unit in units.items()],
            "seen": sample["times_seen"],
        }

    heads = [(CELLS[name], unit.suffix) for name, unit in units.items()]
    return [
        {"kind": kind, "heads": heads, "rows": [as_row(sample) for sample in samples], "has_texts": bool(texts)}
        for kind, samples in (("helps", helpful), ("harms", harmful))
    ]


def excerpt(text: str) -> tuple[str, str]:
    """A text's beginning, cut between words, and the rest that the page folds away."""
    text = str(text)
    if len(text) <= EXCERPT_CHARACTERS:
        return text, ""
    cut = max(text.rfind(" ", 0, EXCERPT_CHARACTERS), EXCERPT_CHARACTERS * 3 // 4)
    left_out = len(text) - TEXT_CHARACTERS
    return text[:cut], text[cut:TEXT_CHARACTERS] + (f" … ({left_out:,} more characters)" if left_out > 0 else "")


def _bars_over_steps(steps: Steps, series: np.ndarray, labels: Labels) -> Chart:
    xs, ys = thin(steps["step"].astype(np.float64), series)
    kinds = ["helps" if y < 0 else "harms" for y in ys]
    return bar_chart(cell_edges(xs), ys, _tips(xs, ys), labels, kinds=kinds, marks=_epoch_ends(steps))


def _line_over_steps(steps: Steps, series: np.ndarray, labels: Labels, total: bool = False) -> Chart:
    xs, ys = thin(steps["step"].astype(np.float64), series, keep_last=total)
    return line_chart(xs, ys, _tips(xs, ys), labels, from_zero=total, marks=_epoch_ends(steps))


def _tips(xs: np.ndarray, ys: np.ndarray) -> list[str]:
    return [f"step {x:,.0f}: {format_number(float(y))}" for x, y in zip(xs, ys, strict=True)]


def _epoch_ends(steps: Steps) -> list[float]:
    """Where an epoch ends between two steps."""
    epoch = np.floor(steps.get("epoch", np.zeros(len(steps["step"]))) - 1e-6)
    return [float(steps["step"][i : i + 2].mean()) for i in np.flatnonzero(np.diff(epoch) > 0)]


# Layers


def _layer_shares(dataset: Rows, column: str, names: Sequence[str] | None) -> dict[str, Any] | None:
    """Each layer's share in the size of the dot products, by kind of module and by depth; None without the column."""
    if column not in column_names(dataset):
        return None
    size = np.zeros(1)
    for start in range(0, len(dataset), ROWS_PER_READ):
        lists = read_columns(dataset, [column], start, ROWS_PER_READ)[column]
        rows = pc.list_flatten(lists).to_numpy().reshape(len(lists), -1)
        size = size + np.abs(np.where(np.isfinite(rows), rows, 0.0)).sum(0, dtype=np.float64)
    names = names if isinstance(names, list | tuple) else [f"layer {i}" for i in range(len(size))]
    if len(names) != len(size):
        raise ValueError(
            f"manifest['identity']['layers'] has {len(names)} names, {column!r} has {len(size)} numbers per row. "
            "Pass the manifest of the store that the rows are from."
        )
    shares = dict(zip(names, (size / (size.sum() or 1.0)).tolist(), strict=True))
    kinds, depths = group_layers(shares)
    strongest = sorted(shares.items(), key=lambda pair: -pair[1])[:MAX_STRONGEST]
    return {
        "count": len(names),
        "kinds": _fold_small(kinds),
        "depth": _depth_chart(depths) if len(depths) > 1 else None,
        "strongest": strongest if len(names) > len(kinds) else [],
    }


def group_layers(shares: Mapping[str, float]) -> tuple[dict[str, list[float]], dict[tuple[str, int], float]]:
    """Adds up shares: `model.layers.7.mlp.up_proj` is of kind `mlp.up_proj` and depth `("model.layers", 7)`."""
    kinds: dict[str, list[float]] = {}
    depths: dict[tuple[str, int], float] = {}
    for name, share in shares.items():
        block = re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", name)
        kind = re.sub(r"\b\d+\.|\.\d+$", "", block[3]) if block else name.rpartition("model.")[2]
        kinds.setdefault(kind, []).append(share)
        if block:
            depth = (block[1], int(block[2]))
            depths[depth] = depths.get(depth, 0.0) + share
    return kinds, depths


def _fold_small(kinds: Mapping[str, Sequence[float]]) -> list[tuple[str, float, int]]:
    """(kind, share, number of layers), largest first, the smallest of many put together."""
    ranked = sorted(((kind, sum(shares), len(shares)) for kind, shares in kinds.items()), key=lambda row: -row[1])
    shown, rest = ranked[:MAX_KINDS], ranked[MAX_KINDS:]
    if rest:
        shown.append((f"{len(rest)} other kinds", sum(row[1] for row in rest), sum(row[2] for row in rest)))
    return shown


def _depth_chart(depths: Mapping[tuple[str, int], float]) -> Chart:
    """One bar per block; an encoder's blocks come before those of the decoder that follows it in the layer list."""
    stacks = list(dict.fromkeys(stack for stack, _ in depths))
    blocks = sorted(depths, key=lambda block: (stacks.index(block[0]), block[1]))
    percent = np.array([100 * depths[block] for block in blocks])
    tips = [f"{stack}.{number}: {depths[stack, number]:.2%}" for stack, number in blocks]
    note = f"{', then '.join(stacks)}; the other layers hold {1 - percent.sum() / 100:.1%}"
    return bar_chart(np.arange(len(blocks) + 1) - 0.5, percent, tips, Labels("By depth", note, "block", "% of all"))
