"""The symbols that keys, values and filler are made of."""

from __future__ import annotations

import string
import unicodedata
from functools import cache


STRUCTURE = "!?:|"  # what tells keys, values, queries and segments apart
# Blocks of printable letters and signs, taken in this order after ASCII's letters and digits.
BLOCKS = ((0x0391, 0x03C9), (0x0410, 0x044F), (0x00C0, 0x00FF), (0x2200, 0x22FF), (0x2500, 0x257F), (0x25A0, 0x25FF))


@cache
def _symbols() -> str:
    further = (chr(code) for first, last in BLOCKS for code in range(first, last + 1))
    # No marks, spaces or unassigned codes; nothing that a normaliser would take apart into several symbols.
    return (
        string.ascii_letters
        + string.digits
        + "".join(
            symbol
            for symbol in further
            if unicodedata.category(symbol)[0] in "LSN" and unicodedata.normalize("NFKD", symbol) == symbol
        )
    )


def alphabet(size: int = 62) -> str:
    """The first so many symbols: a–z, A–Z, 0–9, then letters and signs beyond ASCII.

    Raises:
        ValueError: there are not so many.
    """
    symbols = _symbols()
    if not 1 <= size <= len(symbols):
        raise ValueError(f"vocab_size={size} must be from 1 to {len(symbols)}, the symbols there are.")
    return symbols[:size]


def check_alphabet(symbols: str) -> str:
    """The symbols, if they can be an alphabet.

    Raises:
        ValueError: there are none, one is there twice, or has a meaning of its own.
    """
    taken = sorted(set(symbols) & set(STRUCTURE))
    if taken:
        raise ValueError(
            f"alphabet={symbols!r} has {' '.join(taken)}, which mark keys, queries and segments. Leave them out."
        )
    twice = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
    if twice or not symbols:
        raise ValueError(f"alphabet={symbols!r} must have each symbol once" + (f"; {twice} repeat." if twice else "."))
    unseen = [symbol for symbol in symbols if unicodedata.category(symbol)[0] in "CMZ"]  # controls, marks, spaces
    if unseen:
        raise ValueError(f"alphabet={symbols!r} has {unseen}, which cannot be seen alone. Leave them out.")
    return symbols
