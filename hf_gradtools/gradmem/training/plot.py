"""Exact match against the number of pairs, and what an answer costs against the length of the context."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.gradmem.training.costs import AnswerCosts
from hf_gradtools.gradmem.training.results import label_of


__all__ = ["accuracy_table", "cost_table", "plot_accuracy", "plot_costs"]

Result = dict[str, Any]


def _cells(results: Sequence[Result], metric: str) -> dict[str, dict[int, list[float]]]:
    """Label -> number of pairs -> values of the seeds."""
    cells: dict[str, dict[int, list[float]]] = {}
    for result in results:
        if metric not in result["metrics"]:
            raise ValueError(f"metric={metric!r} is none of {', '.join(sorted(result['metrics']))}.")
        row = cells.setdefault(label_of(result), {})
        row.setdefault(result["num_pairs"], []).append(result["metrics"][metric])
    return dict(sorted(cells.items(), key=lambda item: _order(item[0])))


def _order(label: str) -> tuple[int, str]:
    kinds = ("vanilla", "none", "first", "second")
    return kinds.index(label.split(",")[0]), label


def accuracy_table(results: Sequence[Result], metric: str = "exact_match") -> str:
    """A markdown table of label × number of pairs: mean over the seeds, their extremes, and how many there are."""
    cells = _cells(results, metric)
    pairs = sorted({n for row in cells.values() for n in row})
    lines = [["", *(f"N={n}" for n in pairs)]]
    lines += [[label, *(_summary(row.get(n, [])) for n in pairs)] for label, row in cells.items()]
    return _markdown(lines)


def _summary(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f}, {len(values)} seeds)"


def cost_table(costs: dict[int, AnswerCosts], queries: Sequence[int]) -> str:
    """A markdown table of millions of operations per answered query, by tokens of the context."""
    lines = [
        [
            "context tokens",
            *(f"memory, {_queries(q)}" for q in queries),
            "prompt",
            "cheaper from",
            "than a kept context",
        ]
    ]
    for length, cost in costs.items():
        memory = [f"{cost.per_query(q)['memory'] / 1e6:,.1f}" for q in queries]
        crossings = [_queries(value) for value in (cost.crossing, cost.crossing_cached)]
        lines.append([f"{length:,}", *memory, f"{cost.prompt / 1e6:,.1f}", *crossings])
    return _markdown(lines)


def _queries(crossing: float) -> str:
    if math.isinf(crossing):
        return "never"
    return "1 query" if crossing == 1 else f"{crossing:,} queries"


def _markdown(lines: list[list[str]]) -> str:
    header, *rows = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def plot_accuracy(results: Sequence[Result], out: Path, metric: str = "exact_match") -> None:
    """Draws one line per label over the number of pairs: the mean of the seeds, and their extremes as a band.

    Args:
        results (`Sequence[dict]`): see [`~hf_gradtools.gradmem.training.results.read_results`].
        out (`Path`): file to write, of a format that matplotlib knows.
        metric (`str`): what of their metrics.
    """
    figure, axes = _figure()
    for label, row in _cells(results, metric).items():
        pairs = sorted(row)
        (line,) = axes.plot(pairs, [statistics.mean(row[n]) for n in pairs], marker="o", label=label)
        axes.fill_between(
            pairs, [min(row[n]) for n in pairs], [max(row[n]) for n in pairs], alpha=0.2, color=line.get_color()
        )
    chances = {result["chance"] for result in results if result.get("chance") is not None}
    for chance in chances:
        axes.axhline(chance, color="grey", linestyle=":", label="chance" if len(chances) == 1 else None)
    axes.set(xlabel="pairs in the context (N)", ylabel=metric.replace("_", " "), ylim=(-0.02, 1.02))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({result["num_pairs"] for result in results}), labels=map(str, ticks))
    axes.legend()
    _save(figure, out)


def plot_costs(costs: dict[int, AnswerCosts], queries: Sequence[int], out: Path) -> None:
    """Draws operations per answered query over the length of the context, for several numbers of queries."""
    figure, axes = _figure()
    lengths = list(costs)
    axes.plot(lengths, [costs[n].prompt for n in lengths], color="black", label="context in the prompt")
    for q in queries:
        values = [costs[n].per_query(q)["memory"] for n in lengths]
        axes.plot(lengths, values, marker=".", label=f"memory, {_queries(q)} per context")
    axes.set(xlabel="tokens of the context", ylabel="operations per answered query", xscale="log", yscale="log")
    axes.legend()
    _save(figure, out)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'hf_gradtools[viz]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, out: Path) -> None:
    kind = out.suffix.removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"out={str(out)!r}: its ending must be one of {', '.join(sorted(known))}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        figure.savefig(file, format=kind)
