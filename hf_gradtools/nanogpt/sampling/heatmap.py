"""The likeliest tokens of each step of a sample, as figures and as a page.

T steps, V entries of the vocabulary, k tokens of each step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.sampling.colors import token_ranks
from hf_gradtools.nanogpt.sampling.segments import token_label


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Heatmap", "TopTokens", "figure_class", "plot_heatmap", "save_figure", "top_tokens"]

STEPS_PER_FIGURE = 50
LABEL_CHARACTERS = 12


@dataclass(frozen=True)
class TopTokens:
    """What the model thought likeliest at each step, and what was drawn.

    Args:
        ids: `[T, k]`, the likeliest first.
        probabilities: `[T, k]`, under the model.
        chosen: `[T]`.
        chosen_probabilities: `[T]`.
        ranks: `[T]`, of what was drawn, from 1.
    """

    ids: Tensor
    probabilities: Tensor
    chosen: Tensor
    chosen_probabilities: Tensor
    ranks: Tensor


def top_tokens(logits: Tensor, ids: Tensor, k: int) -> TopTokens:
    """The `k` likeliest tokens of each step, of logits `[T, V]`, and the tokens `[T]` that were drawn; `k` up to V."""
    probabilities = logits.double().softmax(-1)
    best, best_ids = probabilities.topk(min(k, logits.shape[-1]), dim=-1)
    chosen = probabilities.gather(-1, ids[:, None]).squeeze(-1)
    return TopTokens(best_ids, best, ids, chosen, token_ranks(logits, ids))


@dataclass(frozen=True)
class Heatmap:
    """Top tokens with their names, ready to be drawn; one row for each step.

    Args:
        steps: numbers of the steps.
        labels: of the likeliest tokens of each step.
        probabilities: of the same.
        drawn: which of them was drawn, by step; None if it is not among them.
        chosen: label and probability of the token that was drawn.
    """

    steps: list[int]
    labels: list[list[str]]
    probabilities: list[list[float]]
    drawn: list[int | None]
    chosen: list[tuple[str, float]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, top: TopTokens) -> Heatmap:
        """Names the tokens."""
        ids, chosen = top.ids.tolist(), top.chosen.tolist()
        names = {token: token_label(tokenizer, token) for token in {*chosen, *(i for row in ids for i in row)}}
        return cls(
            steps=list(range(len(ids))),
            labels=[[names[token] for token in row] for row in ids],
            probabilities=top.probabilities.tolist(),
            drawn=[row.index(token) if token in row else None for row, token in zip(ids, chosen, strict=True)],
            chosen=[(names[token], p) for token, p in zip(chosen, top.chosen_probabilities.tolist(), strict=True)],
        )

    def rows(self) -> list[dict[str, Any]]:
        """What the page shows of each step."""
        columns = zip(self.steps, self.labels, self.probabilities, self.drawn, self.chosen, strict=True)
        return [
            {"step": step, "cells": list(zip(labels, shares, strict=True)), "drawn": drawn, "chosen": chosen}
            for step, labels, shares, drawn, chosen in columns
        ]


def plot_heatmap(heatmap: Heatmap, path: str | os.PathLike[str], title: str) -> list[Path]:
    """Draws steps against the likeliest tokens, 50 steps in a figure; what was drawn has a red frame.

    Args:
        heatmap (`Heatmap`): the tokens.
        path (`str`): of a PNG; further figures get a number before the ending.
        title (`str`): above each.

    Returns:
        `list[Path]`: files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    written = []
    firsts = range(0, len(heatmap.steps), STEPS_PER_FIGURE)
    for page, first in enumerate(tqdm(firsts, desc="Heatmap", leave=False, disable=len(firsts) < 3)):
        target = path if page == 0 else path.with_name(f"{path.stem}_{page}{path.suffix}")
        save_figure(_draw(heatmap, slice(first, first + STEPS_PER_FIGURE), title), target)
        written.append(target)
    return written


def _draw(heatmap: Heatmap, rows: slice, title: str) -> Figure:
    labels, shares = heatmap.labels[rows], heatmap.probabilities[rows]
    steps, drawn, chosen = heatmap.steps[rows], heatmap.drawn[rows], heatmap.chosen[rows]
    figure = figure_class()(figsize=(2 + 0.9 * len(labels[0]), 1.5 + 0.28 * len(steps)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="probability")
    axes.set(xlabel="rank", ylabel="step: token drawn")
    axes.set_title(title, parse_math=False)
    axes.set_xticks(range(len(labels[0])), [str(rank + 1) for rank in range(len(labels[0]))])
    axes.set_yticks(range(len(steps)))
    names = [f"{step}: {_short(label)}" for step, (label, _) in zip(steps, chosen, strict=True)]
    axes.set_yticklabels(names, parse_math=False)
    for y, row in enumerate(labels):
        _annotate(axes, y, row, shares[y], drawn[y])
    return figure


def _annotate(axes: Any, y: int, labels: Sequence[str], shares: Sequence[float], drawn: int | None) -> None:
    from matplotlib.patches import Rectangle

    for x, (label, share) in enumerate(zip(labels, shares, strict=True)):
        color = "black" if share > 0.6 else "white"
        axes.text(x, y, _short(label), ha="center", va="center", color=color, fontsize=8, parse_math=False)
    if drawn is not None:
        axes.add_patch(Rectangle((drawn - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))


def _short(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 1] + "…"


def figure_class() -> type[Figure]:
    """matplotlib's `Figure`, which needs no global state; ImportError says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf_gradtools[viz]'") from error
    return Figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure whole or not at all; its ending says the format. The folder is made if it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")  # the page has every character
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=100)
