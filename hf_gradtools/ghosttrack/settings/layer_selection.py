"""Which layers of a model: `all`, `0-11`, `0,6,11`, or a list."""

from __future__ import annotations

import re
from collections.abc import Sequence


__all__ = ["format_layers", "parse_layers", "split_layers"]


def parse_layers(selection: str | int | Sequence[int], n_layers: int, name: str = "layers") -> list[int]:
    """The layers that a selection names, ascending, each once.

    Args:
        selection (`str`, `int` or `Sequence[int]`): `"all"`, layer numbers and ranges such as `"0-3,8,10-11"`, one
            number, or numbers.
        n_layers (`int`): of the model.
        name (`str`): of the argument, for errors.

    Raises:
        ValueError: the selection is empty or unreadable, or names a layer twice or one that the model lacks.
    """
    layers: list[int] = []
    if selection == "all":
        return list(range(n_layers))
    parts: list[str | int] = [selection] if isinstance(selection, int) else []
    parts += selection.split(",") if isinstance(selection, str) else []
    parts += selection if not isinstance(selection, str | int) else []
    for part in parts:
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(part))
        if ends is None or isinstance(part, bool) or int(ends[2] or ends[1]) < int(ends[1]):
            raise ValueError(
                f"{name}={selection!r} names no layers in {part!r}. Write all, a range such as 0-11, or a list."
            )
        if int(ends[2] or ends[1]) >= n_layers:
            raise ValueError(f"{name}={selection!r} goes beyond layer {n_layers - 1}, the last of {n_layers}.")
        layers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    if not layers:
        raise ValueError(f"{name}={selection!r} names no layer; need at least 1. Write all.")
    if len(set(layers)) < len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise ValueError(f"{name}={selection!r} names layer {twice} twice. Name it once.")
    return sorted(layers)


def format_layers(layers: Sequence[int]) -> str:
    """Ascending layers as [`parse_layers`] reads them: `0-3,8,10-11`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def split_layers(layers: Sequence[int], parts: int) -> list[list[int]]:
    """`parts` groups of neighbours whose sizes differ by at most one, the larger ones first."""
    if not 1 <= parts <= len(layers):
        raise ValueError(
            f"gpus={parts} cannot share {len(layers)} layers; need 1 to {len(layers)}, so that each has a layer."
        )
    size, larger = divmod(len(layers), parts)
    ends = [part * size + min(part, larger) for part in range(parts + 1)]
    return [list(layers[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)]
