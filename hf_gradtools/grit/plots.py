"""Figures of a GRIT adapter: its spectra, its ranks, its factors.

All of them are `matplotlib.figure.Figure` objects of their own; pyplot and its global state stay out.
"""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_gradtools.core.curvature import eigenbasis
from hf_gradtools.core.store import atomic_write
from hf_gradtools.grit.controller import GritController
from hf_gradtools.grit.report import read_report


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any] | str | os.PathLike[str]

MAX_BAR_LAYERS = 24  # beyond them, spectra are a heatmap of layer and eigen-index
MAX_BARS = 32
LEAST_SHARE = 1e-6  # of a spectrum; what is below does not show
MAX_HEIGHT = 300.0  # inches; Agg draws no more than 65535 pixels
HEATMAP_LAYERS = 6
HEATMAP_KINDS = ("eigenvectors", "factors")
SPECTRA = {"balanced": ("balanced", "C0"), "a": ("Σ_a", "C1"), "g": ("Σ_g", "C2")}


def plot_spectra(
    report_or_controller: Report | GritController,
    path: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
) -> Figure:
    """The eigenvalues that decide the ranks, as shares of their sum: bars per layer, a heatmap for many layers.

    Args:
        report_or_controller: what `rank_report` returns, or the path of `grit_ranks.json`: the balanced spectrum; or
            a controller: those of Σ_a and Σ_g, too.
        path: where to save the figure; its ending says the format.
        layers: names, or patterns such as `"*.q_proj"`; default all that have been measured.

    Raises:
        ValueError: no layer has a spectrum, or `layers` names one that has none.
        ImportError: matplotlib is not installed.
    """
    spectra = _spectra_of(report_or_controller)
    names = _choose(spectra, layers)
    spectra = {name: spectra[name] for name in names}
    figure = _spectrum_bars(spectra) if len(names) <= MAX_BAR_LAYERS else _spectrum_heatmap(spectra)
    return _save(figure, path)


def plot_ranks(report: Report | GritController, path: str | os.PathLike[str] | None = None) -> Figure:
    """Each layer's rank now, in front of the rank it was created with; one row per kind of layer, by depth.

    Marks show `k_a` and `k_b`, the least ranks that hold the threshold of the spectra of Σ_a and Σ_g.

    Args:
        report: what `rank_report` returns, the path of `grit_ranks.json`, or a controller.
        path: where to save the figure; its ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    report = read_report(report)
    kinds: dict[str, list[tuple[_Place, dict[str, Any]]]] = {}
    for place, row in sorted(((_place(name), row) for name, row in report["layers"].items()), key=lambda x: x[0]):
        kinds.setdefault(place.kind, []).append((place, row))
    longest = max(len(rows) for rows in kinds.values())
    width = min(max(6.0, 1.5 + 0.22 * longest), 24.0)
    figure = _figure(width, min(0.6 + 1.6 * len(kinds), MAX_HEIGHT))
    axes = figure.subplots(len(kinds), 1, squeeze=False, sharey=True)[:, 0]
    share = f"{100 * report['threshold']:g} %" if "threshold" in report else "the threshold"
    for ax, (kind, rows) in zip(axes, kinds.items(), strict=True):
        at = range(len(rows))
        ax.bar(at, [row["base_rank"] for _, row in rows], color="0.85", label="base rank")
        ax.bar(at, [row["rank"] for _, row in rows], width=0.6, color="C0", label="rank")
        for key, marker, shift, factor in (("k_a", ">", -0.15, "Σ_a"), ("k_b", "<", 0.15, "Σ_g")):
            seen = [(i + shift, row[key]) for i, (_, row) in enumerate(rows) if key in row]
            if seen:
                label = f"{key}: {share} of {factor}"
                ax.plot(*zip(*seen, strict=True), marker, color="k", markersize=3.5, fillstyle="none", label=label)
        ax.set_title(kind, fontsize=8, loc="left")
        ax.set_xticks(at, ["" if place.depth < 0 else str(place.depth) for place, _ in rows], fontsize=6)
        ax.tick_params(axis="y", labelsize=6)
        ax.yaxis.get_major_locator().set_params(integer=True)
    axes[-1].set_xlabel("depth", fontsize=8)
    figure.supylabel("rank", fontsize=8)
    # The row with the most kinds of marks: a layer that was never measured has none.
    handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=7, frameon=False)
    return _save(figure, path)


def plot_heatmaps(
    controller: GritController,
    path: str | os.PathLike[str] | None = None,
    layers: Sequence[str] | None = None,
    show: str = "eigenvectors",
) -> Figure:
    """Σ_a and Σ_g side by side, one row per layer.

    Args:
        controller: during or after training.
        path: where to save the figure; its ending says the format.
        layers: names, or patterns such as `"*.q_proj"`; default six over the whole depth.
        show: `"eigenvectors"`: their absolute values, one per column, largest eigenvalue first; a diagonal means that
            the factor is diagonal already; `"factors"`: the entries of Σ_a and Σ_g.

    Raises:
        ValueError: no layer has been measured, `layers` names one that has not, or `show` is unknown.
        ImportError: matplotlib is not installed.
    """
    if show not in HEATMAP_KINDS:
        raise ValueError(f"show={show!r} is unknown. Pass one of {', '.join(map(repr, HEATMAP_KINDS))}.")
    factors = {layer.name: f.cpu() for layer, f in controller.live_factors()}
    names = _choose(factors, layers)
    if layers is None and len(names) > HEATMAP_LAYERS:
        names = [names[round(i * (len(names) - 1) / (HEATMAP_LAYERS - 1))] for i in range(HEATMAP_LAYERS)]
    figure = _figure(6.4, 0.6 + 2.6 * len(names))
    grid = figure.subplots(len(names), 2, squeeze=False)
    for name, row in zip(names, grid, strict=True):
        pair = eigenbasis(factors[name])[1].abs() if show == "eigenvectors" else factors[name]
        for ax, values, symbol in zip(row, pair.double().numpy(), ("Σ_a", "Σ_g"), strict=True):
            if show == "eigenvectors":
                image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
                ax.set_xlabel("eigenvector", fontsize=6)
            else:
                bound = float(np.abs(values).max()) or 1.0
                image = ax.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound)
            ax.set_title(f"{name}\n{symbol}", fontsize=7)
            ax.tick_params(labelsize=6)
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=6)
    return _save(figure, path)


# ---- data


class _Place(NamedTuple):
    """Where a layer stands; sorts by kind, then depth."""

    kind: str
    depth: int  # -1: of no block
    name: str


def _place(name: str) -> _Place:
    match = re.match(r"(.*?)\.(\d+)\.(.*)", name)
    if match is None:
        return _Place(name, -1, name)
    inner = re.sub(r"\.(\d+)(?=\.|$)", ".*", match[3])  # experts, and T5's layers within a block
    return _Place(f"{match[1]}.*.{inner}", int(match[2]), name)


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts names by depth: `layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _spectra_of(source: Report | GritController) -> dict[str, dict[str, np.ndarray]]:
    """By layer and key of `SPECTRA`, each as shares of its sum."""
    rows = read_report(source)["layers"]
    spectra = {name: {"balanced": row["balanced"]} for name, row in rows.items() if row.get("balanced")}
    if isinstance(source, GritController):
        for layer, factors in source.live_factors():
            spectra[layer.name] |= dict(zip("ag", eigenbasis(factors)[0].tolist(), strict=True))
    return {name: {key: _shares(values) for key, values in row.items()} for name, row in spectra.items()}


def _shares(values: Iterable[float]) -> np.ndarray:
    array = np.asarray(list(values), dtype=np.float64)
    return array / (array.sum() or 1.0)


def _choose(known: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The names that are wanted, by depth."""
    names = sorted(known, key=_in_order)
    if not names:
        raise ValueError(
            "no layer has statistics: fewer than kfac_min_samples tokens were seen. Train longer, or lower it."
        )
    if wanted is None:
        return names
    patterns = [wanted] if isinstance(wanted, str) else wanted
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"layers={pattern!r} fits no layer with statistics. They are such as {names[0]!r}.")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


# ---- drawing


def _spectrum_bars(spectra: dict[str, dict[str, np.ndarray]]) -> Figure:
    columns = min(4, len(spectra))
    rows = math.ceil(len(spectra) / columns)
    figure = _figure(max(5.0, 3.2 * columns), 0.6 + 2.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(spectra) :]:
        ax.remove()
    shares = np.concatenate([values[:MAX_BARS] for row in spectra.values() for values in row.values()])
    bottom = 10.0 ** math.floor(math.log10(max(shares[shares > 0].min(initial=1.0), LEAST_SHARE) / 2))
    for ax, (name, row) in zip(axes, spectra.items(), strict=False):
        width = 0.8 / len(row)
        for i, (key, values) in enumerate(row.items()):
            label, color = SPECTRA[key]
            shown = values[:MAX_BARS]
            at = np.arange(1, len(shown) + 1) + (i - (len(row) - 1) / 2) * width
            ax.bar(at, shown, width, color=color, label=label)
        ax.set_yscale("log")
        ax.set_ylim(bottom, 1.5)
        ax.set_title(name, fontsize=7)
        ax.tick_params(labelsize=6)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("share of the sum", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=7, frameon=False)
    return figure


def _spectrum_heatmap(spectra: dict[str, dict[str, np.ndarray]]) -> Figure:
    keys = [key for key in SPECTRA if any(key in row for row in spectra.values())]
    longest = max(len(values) for row in spectra.values() for values in row.values())
    figure = _figure(3.0 + 3.0 * len(keys), min(1.2 + 0.11 * len(spectra), MAX_HEIGHT))
    axes: list[Axes] = list(figure.subplots(1, len(keys), squeeze=False, sharey=True)[0])
    image = None
    for ax, key in zip(axes, keys, strict=True):
        table = np.full((len(spectra), longest), np.nan)
        for line, row in zip(table, spectra.values(), strict=True):
            values = row.get(key, np.empty(0))
            line[: len(values)] = np.log10(np.maximum(values, LEAST_SHARE))
        image = ax.imshow(
            table, aspect="auto", interpolation="nearest", vmin=math.log10(LEAST_SHARE), vmax=0,
            extent=(0.5, longest + 0.5, len(spectra) - 0.5, -0.5),
        )  # fmt: skip
        ax.set_title(SPECTRA[key][0], fontsize=8)
        ax.set_xlabel("eigenvalue", fontsize=8)
        ax.tick_params(labelsize=6)
    axes[0].set_yticks(range(len(spectra)), list(spectra), fontsize=5)
    bar = figure.colorbar(image, ax=axes, shrink=0.4)
    bar.set_label("log₁₀ of the share of the sum", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf_gradtools[viz]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            figure.savefig(file, format=target.suffix[1:] or "png", dpi=150)
    return figure
