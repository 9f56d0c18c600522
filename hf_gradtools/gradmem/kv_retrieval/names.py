"""Tasks and their names, such as "N10-K4V4-S4(32-64)_1M"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hf_gradtools.gradmem.kv_retrieval.alphabet import alphabet


GRAMMAR = "N<pairs>-K<length>V<length>[-S<segments>(<min>-<max>)][-V<alphabet>][_<rows>, as 500, 10K or 1M]"
NAME = re.compile(
    r"N(?P<num_pairs>\d+)-K(?P<key_length>\d+)V(?P<value_length>\d+)"
    r"(-S(?P<num_segments>\d+)\((?P<min_segment_length>\d+)-(?P<max_segment_length>\d+)\))?"
    r"(-V(?P<vocab_size>\d+))?(_(?P<size>\d+[KM]?))?"
)
UNITS = {"K": 1_000, "M": 1_000_000}


def parse_count(text: str, name: str = "size") -> int:
    """A number of rows as it is typed: 1000, 1_000, 10K, 1M; `name` is what errors call it.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"([1-9][\d_]*)([KM]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"{name}={text!r} is no number of rows. Write it as 500, 1_000, 10K or 1M.")
    return int(match[1].replace("_", "")) * UNITS.get(match[2], 1)


def format_count(count: int) -> str:
    """The shortest way to write it that is exact."""
    for unit, size in reversed(UNITS.items()):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


@dataclass(frozen=True)
class KVRetrievalConfig:
    """A task: what its rows look like.

    Args:
        num_pairs: N, pairs in a context; their keys differ.
        key_length, value_length: symbols.
        num_segments: parts of the context that end in `|`, over which pairs and random filler are spread; 0 for the
            pairs alone.
        min_segment_length, max_segment_length: symbols of a segment, its pairs included; more if they need more.
        vocab_size: symbols of the alphabet.
        size: rows, if the name tells.

    Raises:
        ValueError: a number is out of range, or there are not enough keys.
    """

    num_pairs: int
    key_length: int
    value_length: int
    num_segments: int = 0
    min_segment_length: int = 0
    max_segment_length: int = 0
    vocab_size: int = 62
    size: int | None = None

    def __post_init__(self) -> None:
        alphabet(self.vocab_size)
        for name in ("num_pairs", "key_length", "value_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_segments < 0 or not 0 <= self.min_segment_length <= self.max_segment_length:
            raise ValueError(
                f"num_segments={self.num_segments} of {self.min_segment_length} to {self.max_segment_length} symbols: "
                "give at least 0 segments, and lengths from 0 that do not fall."
            )
        if self.num_segments == 0 and self.max_segment_length:
            raise ValueError(f"max_segment_length={self.max_segment_length} needs segments: num_segments is 0.")
        if self.num_pairs > self.vocab_size**self.key_length:
            raise ValueError(
                f"num_pairs={self.num_pairs} needs as many different keys, and there are {self.vocab_size}^"
                f"{self.key_length} = {self.vocab_size**self.key_length}. Take longer keys or a larger alphabet."
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 row.")

    @classmethod
    def from_name(cls, name: str) -> KVRetrievalConfig:
        """Reads a name.

        Raises:
            ValueError: it is no name of a task, or a task that cannot be.
        """
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"name={name!r} is no name of a task. Write it as {GRAMMAR}, such as N10-K4V4-S4(32-64)_1M."
            )
        numbers = {key: value for key, value in match.groupdict().items() if value is not None}
        size = parse_count(numbers.pop("size")) if "size" in numbers else None
        return cls(**{key: int(value) for key, value in numbers.items()}, size=size)

    @property
    def name(self) -> str:
        """The name that reads as this task; the alphabet's size is told if it is not 62, or there are no segments."""
        name = f"N{self.num_pairs}-K{self.key_length}V{self.value_length}"
        if self.num_segments:
            name += f"-S{self.num_segments}({self.min_segment_length}-{self.max_segment_length})"
        if self.vocab_size != 62 or not self.num_segments:
            name += f"-V{self.vocab_size}"
        return name if self.size is None else f"{name}_{format_count(self.size)}"

    def with_size(self, size: int | None) -> KVRetrievalConfig:
        """The same task of so many rows."""
        return replace(self, size=size)
