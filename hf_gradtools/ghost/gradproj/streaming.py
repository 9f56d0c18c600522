"""Streams the gradients of a store, so that neither its numbers nor the pages of its files pile up in memory.

A sealed shard is memory-mapped, and the pages of a record batch (16 MiB) are given back once it has been read: mapped
pages count as resident memory. What is in progress is read batch by batch, since the writer may cut it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...core.shards import SEALED, map_sealed, open_shards, open_table, whole_batches


GRADIENT = "gradient"
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
DROP_PAGES = getattr(mmap, "MADV_DONTNEED", None)


@dataclass(frozen=True)
class Shard:
    """A file and how many rows it had when it was opened."""

    path: Path
    num_rows: int

    @property
    def current(self) -> Path:
        """The file that holds the rows now: the writer may have sealed it since."""
        return self.path if self.path.exists() else self.path.with_suffix(SEALED)

    def table(self) -> pa.Table:
        """All columns, of a sealed shard memory-mapped."""
        return open_table(self.current).slice(0, self.num_rows)


@dataclass(frozen=True)
class Layout:
    """Where the gradients are and how to read them: `dim` numbers of `dtype` in each row of `shards`."""

    shards: tuple[Shard, ...]
    dim: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)


def list_layout(path: Path, dim: int, dtype: str) -> Layout:
    """The shards of a store with the rows they hold now."""
    shards = open_shards(path, lambda file: Shard(file, _count(file)))
    return Layout(tuple(shard for shard in shards if shard.num_rows), dim, DTYPES[dtype])


def _count(shard: Path) -> int:
    if shard.suffix == SEALED:
        return int(map_sealed(shard).num_rows)
    with pa.OSFile(str(shard)) as source:
        return sum(batch.num_rows for batch in whole_batches(source))


def iter_blocks(layout: Layout, rows_per_block: int) -> Iterator[tuple[int, Tensor]]:
    """All rows in blocks of equal length, the last one shorter.

    Yields:
        (first row, `[n, dim]` float32). The next block overwrites it: clone what shall stay.
    """
    buffer = torch.empty(min(rows_per_block, max(layout.num_rows, 1)), layout.dim)
    first = filled = 0
    for piece in iter_pieces(layout):
        start = 0
        while start < len(piece):
            taken = piece[start : start + len(buffer) - filled]
            start += len(taken)
            if len(taken) == len(buffer) and taken.dtype == torch.float32:
                yield first, taken  # nothing to convert
                first += len(taken)
                continue
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == len(buffer):
                yield first, buffer
                first, filled = first + filled, 0
    if filled:
        yield first, buffer[:filled]
    _check_all_came(first + filled, layout)


def iter_pieces(layout: Layout) -> Iterator[Tensor]:
    """The gradients of one record batch after the other, `[n, dim]` as stored, valid until the next one."""
    for shard in layout.shards:
        missing = shard.num_rows
        for values in _mapped(shard, layout) if shard.current.suffix == SEALED else _read(shard, layout):
            if missing:  # what was appended since the store was opened is not among its rows
                piece = values.view(-1, layout.dim)[:missing]
                missing -= len(piece)
                yield piece


def _mapped(shard: Shard, layout: Layout) -> Iterator[Tensor]:
    with open(shard.current, "rb") as file:
        # A private mapping: torch takes no memory that is read-only.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = pa.py_buffer(mapping)
    read_to = 0
    for batch in pa.ipc.open_stream(whole):
        values = batch.column(GRADIENT).values
        start = values.buffers()[1].address - whole.address + values.offset * layout.dtype.itemsize
        yield torch.frombuffer(mapping, dtype=layout.dtype, count=len(values), offset=start)
        end = (start + len(values) * layout.dtype.itemsize) // mmap.PAGESIZE * mmap.PAGESIZE
        if DROP_PAGES is not None and end > read_to:
            mapping.madvise(DROP_PAGES, read_to, end - read_to)
            read_to = end


def _read(shard: Shard, layout: Layout) -> Iterator[Tensor]:
    with pa.OSFile(str(shard.current)) as source:
        for batch in whole_batches(source):
            yield torch.from_numpy(batch.column(GRADIENT).values.to_numpy().copy()).view(layout.dtype)


def read_rows(layout: Layout, indices: Tensor) -> Tensor:
    """The gradients of some rows.

    Args:
        indices: `[n]` int64, each at least 0 and below the number of rows.

    Returns:
        `[n, dim]` float32, in the order of `indices`.
    """
    ordered, places = indices.sort()
    out = torch.empty(len(indices), layout.dim)
    first = 0
    for piece in iter_pieces(layout):
        low, high = torch.searchsorted(ordered, torch.tensor([first, first + len(piece)])).tolist()
        if high > low:
            out[places[low:high]] = piece[ordered[low:high] - first].float()
        first += len(piece)
    _check_all_came(first, layout)
    return out


def _check_all_came(num_rows: int, layout: Layout) -> None:
    """Rows that were there when a store was opened may have been dropped by its writer since."""
    if num_rows < layout.num_rows:
        raise RuntimeError(
            f"the store had {layout.num_rows} rows when it was opened and has {num_rows} of them now: its writer "
            "dropped some. Open it again."
        )


def column_of(shards: Sequence[Shard], name: str) -> np.ndarray:
    """A column other than the gradient, in memory."""
    parts = [shard.table()[name].to_numpy() for shard in shards]
    return np.concatenate(parts) if parts else np.empty(0)
