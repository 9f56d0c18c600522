"""A self-contained HTML page of what a search found: what it says is here, its look in `ghost/templates/`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_gradtools.core.store import atomic_write
from hf_gradtools.ghost.charts import Unit
from hf_gradtools.ghost.gradproj.stored_run import Answer, Hit
from hf_gradtools.ghost.report import environment, excerpt, group_layers


__all__ = ["layer_shares", "write_search_report"]

MAX_BARS = 12  # of kinds of layers, and of blocks


def write_search_report(
    answers: Sequence[Answer],
    output_path: str | os.PathLike[str],
    *,
    model: str,
    figures: Mapping[str, str],
    settings: Mapping[str, Any],
    note: str = "",
) -> Path:
    """Writes one HTML file, without scripts or anything from the network.

    Args:
        answers: the queries and what was found.
        output_path: the file to make; it appears whole or not at all.
        model: its name.
        figures: a few numbers for the top.
        settings: how it was searched.
        note: why the shares of layers are not there, if they are not.

    Returns:
        the file written.
    """
    html = (
        environment()
        .get_template("search.html.j2")
        .render(
            model=model,
            created=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
            figures=figures,
            settings=settings,
            note=note,
            answers=[_answer(answer) for answer in answers],
        )
    )
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", errors="replace"))
    return path


def layer_shares(layers: Mapping[str, float]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Signed shares of kinds of layers and of blocks in the size of an inner product.

    Args:
        layers: each layer's part of the inner product.

    Returns:
        (heading, [(name, share)]): kinds by size, blocks by depth. Sizes of a layer's parts add up to 1, so that a
        kind whose layers disagree has a small share.
    """
    size = sum(map(abs, layers.values())) or 1.0
    kinds, depths = group_layers({name: part / size for name, part in layers.items()})
    by_size = sorted(((kind, sum(parts)) for kind, parts in kinds.items()), key=lambda pair: -abs(pair[1]))
    shares = [("By kind of layer", _fold(by_size))]
    if len(depths) > 1:
        blocks = [(f"{stack}.{number}", depths[stack, number]) for stack, number in sorted(depths)]
        shares.append(("By depth", _in_groups(blocks)))
    return shares


def _fold(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    shown, rest = pairs[:MAX_BARS], pairs[MAX_BARS:]
    return [*shown, (f"{len(rest)} other kinds", sum(share for _, share in rest))] if rest else shown


def _in_groups(blocks: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbouring blocks put together, where there are many."""
    per_bar = -(-len(blocks) // MAX_BARS)
    groups = [blocks[i : i + per_bar] for i in range(0, len(blocks), per_bar)]
    return [
        (
            f"{group[0][0]} – {group[-1][0].rpartition('.')[2]}" if len(group) > 1 else group[0][0],
            sum(s for _, s in group),
        )
        for group in groups
    ]


def _answer(answer: Answer) -> dict[str, Any]:
    unit = Unit.of([hit.score for hit in answer.hits])
    largest = max((abs(hit.score) for hit in answer.hits), default=0.0) or 1.0
    return {
        "query": excerpt(answer.query),
        "unit": unit.suffix,
        "hits": [
            {**_hit(hit), "score": unit.format(hit.score), "bar": 100 * abs(hit.score) / largest}
            for hit in answer.hits
        ],
    }


def _hit(hit: Hit) -> dict[str, Any]:
    return {
        "id": hit.sample_id,
        "kind": "helps" if hit.score >= 0 else "harms",
        "text": None if hit.text is None else excerpt(hit.text),
        "shares": layer_shares(hit.layers) if hit.layers else [],
    }
