"""Figures and pages of statistics and of softmax variants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.nanogpt.sampling.heatmap import figure_class, save_figure
from hf_gradtools.nanogpt.sampling.pages import write_page


if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["plot_softmax", "plot_statistics", "write_statistics_page"]

PANELS = {"stdev": "log", "kurtosis": "symlog", "abs_max": "log"}
MAX_HEIGHT = 300.0  # inches; Agg draws no more than 65535 pixels


def plot_statistics(statistics: Dataset, path: str | os.PathLike[str] | None = None, title: str = "") -> Figure:
    """Standard deviation, kurtosis and largest value of each weight or module, side by side.

    Args:
        statistics (`datasets.Dataset`): of [`weight_statistics`] or [`activation_statistics`].
        path (`str`, *optional*): where to save the figure; its ending says the format.
        title (`str`, defaults to none): above it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    names = list(statistics["name"])
    height = min(1.2 + 0.18 * len(names), MAX_HEIGHT)
    figure = figure_class()(figsize=(13, height), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axes, (column, scale) in zip(panels, PANELS.items(), strict=True):
        axes.plot(list(statistics[column]), range(len(names)), "o", markersize=4)
        axes.set_xscale(scale)
        axes.set_xlabel(column)
        axes.grid(visible=True, axis="both", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, parse_math=False)
    if path is not None:
        save_figure(figure, path)
    return figure


def plot_softmax(scores: Tensor, weights: Mapping[str, Tensor], path: str | os.PathLike[str] | None = None) -> Figure:
    """What variants make of a row of scores: their weights, and the same divided by their sum.

    Args:
        scores (`Tensor`): `[K]`.
        weights (`Mapping[str, Tensor]`): `[K]` each, of [`softmax_weights`].
        path (`str`, *optional*): where to save the figure; its ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = figure_class()(figsize=(12, 5), layout="constrained")
    absolute, relative = figure.subplots(1, 2)
    order = scores.argsort()
    for number, (name, row) in enumerate(weights.items()):
        style = {
            "label": name,
            "linestyle": ("-", "--", ":")[number // 10 % 3],
            "marker": "." if len(row) < 60 else "",
        }
        absolute.plot(scores[order].tolist(), row[order].tolist(), **style)
        if total := row.sum().item():
            relative.plot(scores[order].tolist(), (row[order] / total).tolist(), **style)
    absolute.set(xlabel="score", ylabel="weight", yscale="log", title="weights")
    relative.set(xlabel="score", ylabel="share of the row", title="weights over their sum")
    for axes in (absolute, relative):
        axes.grid(visible=True, alpha=0.3)
    handles, labels = absolute.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def write_statistics_page(
    path: str | os.PathLike[str], title: str, tables: Iterable[tuple[str, str, Sequence[Mapping[str, Any]]]]
) -> Path:
    """Writes tables to a page that needs no other file.

    Args:
        path (`str`): the page.
        title (`str`): of the page.
        tables (`Iterable`): title, explanation and rows of each.
    """
    shown = [
        {
            "title": name,
            "text": text,
            "columns": list(rows[0]) if rows else [],
            "rows": [[show_cell(value) for value in row.values()] for row in rows],
        }
        for name, text, rows in tables
    ]
    return write_page("statistics.html.j2", path, title=title, tables=shown)


def show_cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
