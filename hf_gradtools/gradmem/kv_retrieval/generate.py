"""Rows of a task by blocks: each block is drawn from (task, seed, split, number of the block) alone.

Legend: R rows of a block, N pairs, S segments, P symbols of a pair `!K:V!`.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hf_gradtools.gradmem.kv_retrieval.alphabet import alphabet
from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig


BLOCK_ROWS = 1000
SPLITS = ("train", "valid")
FEW_NUMBERS = 64  # all of them are shuffled, whatever the share that is wanted

Columns = dict[str, list[str] | list[list[str]]]
Integers = NDArray[np.int64]
Codes = NDArray[np.uint32]  # code points of symbols


def generate_block(config: KVRetrievalConfig, seed: int, block: int, split: str = "train") -> Columns:
    """The 1,000 rows of one block, the same wherever and whenever they are drawn."""
    return block_table(config, seed, block, split).to_pydict()


def block_table(config: KVRetrievalConfig, seed: int, block: int, split: str = "train") -> pa.Table:
    """The same rows as columns "context", "query", "target" and "kv_pairs"."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), block))
    rng = np.random.Generator(np.random.Philox(sequence))
    symbols = np.array([ord(symbol) for symbol in alphabet(config.vocab_size)], np.uint32)
    keys = symbols[draw_keys(config, rng)]
    values = symbols[rng.integers(config.vocab_size, size=(*keys.shape[:2], config.value_length))]
    asked = np.arange(BLOCK_ROWS), rng.integers(config.num_pairs, size=BLOCK_ROWS)
    pairs = _joined("!", keys, ":", values, "!")
    bounds = np.arange(BLOCK_ROWS + 1, dtype=np.int32) * config.num_pairs
    return pa.table(
        {
            "context": _contexts(config, pairs, symbols, rng),
            "query": _strings(_joined("?!", keys[asked], ":")),
            "target": _strings(_joined(values[asked], "!|")),
            "kv_pairs": pa.ListArray.from_arrays(bounds, _strings(pairs.reshape(-1, pairs.shape[-1]))),
        }
    )


def draw_keys(config: KVRetrievalConfig, rng: np.random.Generator) -> Integers:
    """Keys `[R, N, length]`, as places in the alphabet: of each row any N of all keys, in any order."""
    base, length = config.vocab_size, config.key_length
    # Longer keys differ in their first symbols; of 2^52 beginnings or more, two are hardly ever alike anyway.
    told = min(length, int(62 / np.log2(max(base, 2))))
    numbers = _without_repeats(rng, config.num_pairs, base**told)
    first = (numbers[..., None] // base ** np.arange(told)[::-1]) % base
    return np.concatenate([first, rng.integers(base, size=(*numbers.shape, length - told))], -1)


def _without_repeats(rng: np.random.Generator, n: int, space: int) -> Integers:
    """Different numbers below `space` `[R, n]`, uniform: any that may stand in a row do so as often."""
    if space <= max(FEW_NUMBERS, 2 * n):
        return rng.permuted(np.tile(np.arange(space), (BLOCK_ROWS, 1)), axis=1)[:, :n]
    drawn, again = rng.integers(space, size=(BLOCK_ROWS, n)), np.arange(BLOCK_ROWS)
    while len(again):  # of equal numbers all but the first are drawn anew, whichever number it is
        order = drawn[again].argsort(1, kind="stable")
        numbers = np.take_along_axis(drawn[again], order, 1)
        row, place = np.nonzero(numbers[:, 1:] == numbers[:, :-1])
        drawn[again[row], order[row, place + 1]] = rng.integers(space, size=len(row))
        again = again[np.unique(row)]
    return drawn


def _contexts(config: KVRetrievalConfig, pairs: Codes, symbols: Codes, rng: np.random.Generator) -> pa.StringArray:
    """Segments of random symbols, in which each pair stands at a random place of a random segment."""
    rows, n, length = pairs.shape
    if not config.num_segments:
        return _strings(_joined(pairs.reshape(rows, n * length), "|"))
    segment = rng.integers(config.num_segments, size=(rows, n))
    held = np.stack([(segment == s).sum(1) for s in range(config.num_segments)], 1) * length  # by pairs [R, S]
    least = np.maximum(config.min_segment_length - held, 0)
    fill = rng.integers(least, np.maximum(config.max_segment_length - held, 0) + 1)
    place = (rng.random(segment.shape) * (np.take_along_axis(fill, segment, 1) + 1)).astype(np.int64)
    order = np.lexsort((place, segment), axis=1)
    filler = symbols[rng.integers(len(symbols), size=int(fill.sum()))]

    ends = np.cumsum(fill + held + 1, 1) - 1  # where the row has each segment's `|`
    # A pair stands after what its segment begins with, its place in the filler, and the segment's pairs before it.
    begins = ends - fill - np.cumsum(held, 1)  # without the row's pairs, which `order` numbers
    starts = np.take_along_axis(np.take_along_axis(begins, segment, 1) + place, order, 1) + np.arange(n) * length
    lengths = ends[:, -1] + 1
    first = (np.cumsum(lengths) - lengths)[:, None]
    text, free = np.empty(lengths.sum(), np.uint32), np.ones(lengths.sum(), bool)
    for where, what in (
        (first + ends, ord("|")),
        ((first + starts)[..., None] + np.arange(length), np.take_along_axis(pairs, order[..., None], 1)),
    ):
        text[where], free[where] = what, False
    text[free] = filler
    return _strings(text, lengths)


def _joined(*parts: str | Codes) -> Codes:
    """Symbols `[..., length]` beside each other; a text stands in every row."""
    shape = next(part.shape[:-1] for part in parts if not isinstance(part, str))
    codes = (np.array([*map(ord, part)], np.uint32) if isinstance(part, str) else part for part in parts)
    return np.concatenate([np.broadcast_to(part, (*shape, part.shape[-1])) for part in codes], -1)


def _strings(text: Codes, lengths: Integers | None = None) -> pa.StringArray:
    """The rows of a matrix of symbols as texts; or of all symbols in a row, texts of some lengths."""
    if lengths is None:
        lengths, text = np.full(len(text), text.shape[1]), text.reshape(-1)
    size = sum((text >= least).view(np.uint8) for least in (0, 0x80, 0x800, 0x10000))  # bytes of UTF-8
    starts = np.zeros(len(text) + 1, np.int32)
    np.cumsum(size, out=starts[1:])
    data = text.astype("<u4").tobytes().decode("utf-32-le").encode()
    starts = starts[np.concatenate([[0], np.cumsum(lengths)])]
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(starts), pa.py_buffer(data))
