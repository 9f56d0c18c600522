"""Rows of a task by blocks: each block is drawn from (task, seed, split, number of the block) alone.

Legend: R rows of a block, N pairs, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hf_gradtools.gradmem.kv_retrieval.alphabet import alphabet
from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig


BLOCK_ROWS = 1000
SPLITS = ("train", "valid")
COLUMNS = ("context", "query", "target", "kv_pairs")
FEW_KEYS = 4096  # all of them can be shuffled for each row

Columns = dict[str, list[str] | list[list[str]]]
Integers = NDArray[np.int64]


def generate_block(config: KVRetrievalConfig, seed: int, block: int, split: str = "train") -> Columns:
    """The 1,000 rows of one block, the same wherever and whenever they are drawn."""
    sequence = np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), block))
    rng = np.random.Generator(np.random.Philox(sequence))
    symbols = np.array(list(alphabet(config.vocab_size)))
    keys = _texts(symbols[draw_keys(config, rng)])
    values = _texts(symbols[rng.integers(config.vocab_size, size=(*keys.shape, config.value_length))])
    asked = rng.integers(config.num_pairs, size=len(keys))
    pairs = [[f"!{k}:{v}!" for k, v in zip(*row, strict=True)] for row in zip(keys, values, strict=True)]
    return {
        "context": list(_contexts(config, pairs, symbols, rng))
        if config.num_segments
        else ["".join(p) + "|" for p in pairs],
        "query": [f"?!{row[i]}:" for row, i in zip(keys, asked, strict=True)],
        "target": [f"{row[i]}!|" for row, i in zip(values, asked, strict=True)],
        "kv_pairs": pairs,
    }


def draw_keys(config: KVRetrievalConfig, rng: np.random.Generator) -> Integers:
    """Keys `[R, N, length]`, as places in the alphabet: of each row any N of all keys, in any order."""
    n, length, base = config.num_pairs, config.key_length, config.vocab_size
    space = base**length
    if space <= FEW_KEYS:
        numbers = rng.permuted(np.tile(np.arange(space), (BLOCK_ROWS, 1)), axis=1)[:, :n]
    elif n * n > space:  # most draws would have a key twice
        numbers = np.stack([rng.choice(space, n, replace=False) for _ in range(BLOCK_ROWS)])
    else:  # keys by their hands of digits that fit a number, most often one
        hand = int(62 / np.log2(max(base, 2)))
        hands = [min(hand, length - start) for start in range(0, length, hand)]
        drawn = _without_repeats(rng, n, [base**digits for digits in hands])
        return np.concatenate([_digits(drawn[..., i], base, digits) for i, digits in enumerate(hands)], -1)
    return _digits(numbers, base, length)


def _digits(numbers: Integers, base: int, length: int) -> Integers:
    return (numbers[..., None] // base ** np.arange(length)[::-1]) % base


def _without_repeats(rng: np.random.Generator, n: int, spaces: list[int]) -> Integers:
    """Draws rows of n keys `[R, n, hands]`, and draws those again in which one is twice: what is left is uniform."""
    drawn = rng.integers(spaces, size=(BLOCK_ROWS, n, len(spaces)))
    again = np.arange(BLOCK_ROWS)
    while len(again):
        order = np.lexsort(np.moveaxis(drawn[again], -1, 0), axis=1)
        keys = np.take_along_axis(drawn[again], order[..., None], 1)
        again = again[(keys[:, 1:] == keys[:, :-1]).all(-1).any(1)]
        drawn[again] = rng.integers(spaces, size=(len(again), n, len(spaces)))
    return drawn


def _texts(symbols: NDArray[np.str_]) -> NDArray[np.object_]:
    """Texts `[R, N]` from symbols `[R, N, length]`."""
    length = symbols.shape[-1]
    return np.ascontiguousarray(symbols).view(f"<U{length}")[..., 0].astype(object)


def _contexts(
    config: KVRetrievalConfig, pairs: list[list[str]], symbols: NDArray[np.str_], rng: np.random.Generator
) -> Iterator[str]:
    """Segments of random symbols, in which each pair stands at a random place of a random segment."""
    rows, segments = len(pairs), config.num_segments
    segment = rng.integers(segments, size=(rows, config.num_pairs))
    taken = np.stack([(segment == s).sum(1) for s in range(segments)], 1) * len(pairs[0][0])
    shortest = np.maximum(config.min_segment_length - taken, 0)
    fill = rng.integers(shortest, np.maximum(config.max_segment_length - taken, 0) + 1)  # [R, S]
    place = (rng.random(segment.shape) * (np.take_along_axis(fill, segment, 1) + 1)).astype(np.int64)
    order = np.lexsort((place, segment), axis=1)
    # Where each pair stands in the row's filler, all segments in a row.
    starts = np.cumsum(fill, 1) - fill
    place = np.take_along_axis(place + np.take_along_axis(starts, segment, 1), order, 1)
    segment = np.take_along_axis(segment, order, 1)
    filler = "".join(symbols[rng.integers(len(symbols), size=int(fill.sum()))])
    begin = 0
    for row in range(rows):
        ends, text = (starts[row] + fill[row]).tolist(), filler[begin : begin + int(fill[row].sum())]
        begin += len(text)
        yield _assemble(text, ends, pairs[row], order[row].tolist(), place[row].tolist(), segment[row].tolist())


def _assemble(
    text: str, ends: list[int], pairs: list[str], order: list[int], places: list[int], segments: list[int]
) -> str:
    """One context: the filler, with pairs put in at their places and `|` at the ends of segments."""
    parts, at, current = [], 0, 0
    for index, place, segment in zip(order, places, segments, strict=True):
        while current < segment:
            parts += [text[at : ends[current]], "|"]
            at, current = ends[current], current + 1
        parts += [text[at:place], pairs[index]]
        at = place
    for end in ends[current:]:
        parts += [text[at:end], "|"]
        at = end
    return "".join(parts)
