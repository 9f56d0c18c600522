"""The order of hookpoints: by layer, numbers in names compared as numbers."""

from __future__ import annotations

import re


__all__ = ["by_layer"]


def by_layer(name: str) -> list[tuple[int, str]]:
    """What to sort names by: `"layers.2"` comes before `"layers.10"`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
