"""The path of a greedy search, from its results file."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.search.reading import read_documents


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accepted_path", "plot_search"]

UNITS = {
    "params": "parameters",
    "vram": "peak memory (MB)",
    "iter": "iteration (ms)",
    "macs": "multiply-accumulates per token",
    "exp": "exponentials per token",
    "kv_bytes": "bytes of keys, values and states",
}


def accepted_path(log: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    """Cost, score and last change of the baseline and of what each round accepted.

    Args:
        log (`Mapping`): as [`~hf_gradtools.nanogpt.search.greedy.greedy_search`] returns it.
    """
    path = []
    for entry in log["iterations"]:
        metrics, chosen = entry["baseline_metrics"], entry.get("chosen")
        if chosen is not None:
            path.append((metrics["cost"], metrics["score"], f"{chosen['param']} = {_value(chosen['value'])}"))
        elif entry["iter"] < 0 or "action" in entry:
            path.append((metrics["cost"], metrics["score"], entry.get("action", "baseline").replace("_", " ")))
    return path


def plot_search(log: Mapping[str, Any] | str | Path, path: str | Path | None = None) -> Figure:
    """The accepted path of a greedy search in the plane of cost and score, in front of all candidates it measured.

    Args:
        log (`Mapping`, `str` or `Path`): what the search returned, or its results file.
        path (`str` or `Path`, *optional*): where to save the figure; its ending says the format.

    Returns:
        `matplotlib.figure.Figure`: of its own; pyplot stays out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots are drawn by matplotlib: pip install 'hf_gradtools[viz]'") from error
    if not isinstance(log, Mapping):
        (log,) = read_documents(log)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    entries = [entry for each in log["iterations"] for entry in each.get("candidates", [])]
    measured = [(entry["cost"], entry["avg_score"]) for entry in entries if "avg_score" in entry]
    if measured:
        axes.scatter(*zip(*measured, strict=True), s=14, color="0.7", label="candidates", zorder=1)
    steps = accepted_path(log)
    costs, scores, labels = zip(*steps, strict=True)
    axes.plot(costs, scores, "o-", color="C0", label="accepted", zorder=2)
    for cost, score, label in steps:
        axes.annotate(label, (cost, score), xytext=(4, 4), textcoords="offset points", fontsize="small")
    axes.set_xlabel(UNITS[log["settings"]["efficiency_target"]])
    axes.set_ylabel("score, exp(−validation loss)")
    axes.legend(loc="lower right")
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, tmp_suffix=f".{uuid.uuid4().hex}.tmp") as file:
            figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=150)
    return figure


def _value(value: Any) -> str:
    if isinstance(value, Mapping):  # of n_layer
        return str(value["new_layers"])
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
