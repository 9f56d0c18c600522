"""Rows on disk that survive a kill at any moment: append, resume, merge ranks, read back as `datasets.Dataset`.

A store is a folder:

    manifest.json                 what the rows are (`identity`) and whether they are all there (`complete`)
    shard-00000-00000.arrow       rank 0, shard 0: sealed, memory-mapped by readers
    shard-00000-00000.sha256      its checksums (`core/checksums.py`)
    shard-00000-00001.inprogress  rank 0, shard 1: grows by one record batch per append

Both kinds of shard are Arrow IPC streams. The folder listing is the truth about the rows, the manifest only about
their identity, so nothing has to be kept in step. Four rules make every moment a good one to be killed in:

- an append is one write at the end of the file, so a kill leaves whole batches and at most one torn tail, which
  readers ignore;
- every other file appears under its name by `os.replace`, whole and on disk;
- a sealed shard makes the in-progress file of the same rank and number stale, whether or not it is deleted yet;
- checksums are on disk before what they describe, and while a shard is replaced those of both versions are.

They hold for a killed process and a full disk. After a power failure sealed shards are whole too, but the in-progress
file may have lost appends that the kernel had not written back.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .atomic import atomic_write, write_json_atomically
from .checksums import HashingFile, known_versions, sidecar_of, write_sealed_json, write_sidecar
from .shards import (
    CHECKSUMS,
    IN_PROGRESS,
    MANIFEST,
    SCHEMA_VERSION,
    SEALED,
    StoreMismatchError,
    as_json,
    differences,
    list_shards,
    map_sealed,
    read_dataset,
    read_manifest,
    read_table,
    whole_batches,
)


if TYPE_CHECKING:
    from io import FileIO

    from typing_extensions import Self


__all__ = [
    "MANIFEST",
    "RowStore",
    "StoreMismatchError",
    "atomic_write",
    "read_dataset",
    "read_manifest",
    "read_table",
    "write_json_atomically",
]

ROWS_PER_SEALED_BATCH = 10_000  # few batches for fast random access, yet a bounded copy while sealing
BYTES_PER_SEALED_BATCH = 16 * 2**20


class RowStore:
    """The one writer of one rank's rows in a store; opening it also recovers what a killed process left.

    Args:
        path (`str` or `os.PathLike`):
            Folder of the store; created if absent.
        identity (`dict[str, Any]`):
            JSON values that say what the rows are (model, layers, seed, ...). An existing store must have the same.
        extra (`dict[str, Any]`, *optional*):
            JSON values worth recording when the store is created but free to differ later (library version, date).
        rank (`int`, defaults to 0):
            Rank of this process. No two processes may write for the same rank at the same time.
        rows_per_shard (`int`, defaults to 100_000):
            The in-progress file is sealed once it holds this many rows.

    Attributes:
        complete (`bool`): whether the store was marked complete when it was opened.
        num_rows (`int`): rows of this rank, sealed or not.

    Raises:
        StoreMismatchError: if the folder holds a store of another identity.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        *,
        extra: dict[str, Any] | None = None,
        rank: int = 0,
        rows_per_shard: int = 100_000,
    ) -> None:
        if rank < 0 or rows_per_shard < 1:
            raise ValueError(f"need rank >= 0 and rows_per_shard >= 1, got {rank=}, {rows_per_shard=}. Correct them.")
        self.path = Path(path)
        self.rank = rank
        self.rows_per_shard = rows_per_shard
        self._tmp_suffix = f".{rank:05d}.tmp"
        self._manifest = self._open_manifest(as_json({"identity": identity, "extra": extra or {}}))
        self.complete: bool = self._manifest["complete"]
        self._file: FileIO | None = None
        self._number = 0  # of the in-progress file, which exists from the first append on
        self._end = 0  # bytes of whole batches in it
        self._rows_in_progress = 0

        for leftover in self.path.glob(f"*{self._tmp_suffix}"):
            leftover.unlink()
        in_progress = self._in_progress_shards()
        number, last = max(self._shards().items(), default=(-1, None))
        self._seal(shard for shard in in_progress if shard != last)  # there are such only if sealing failed
        sealed = self._sealed_shards()
        tables = [map_sealed(shard) for shard in sealed.values()]
        self.num_rows: int = sum(table.num_rows for table in tables)
        self._schema: pa.Schema | None = tables[0].schema if tables else None
        self._number = max(sealed, default=-1) + 1
        if last in in_progress:
            self._number = number
            self._continue()
            if self._rows_in_progress >= self.rows_per_shard:  # killed just before it would have been sealed
                self.seal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, columns: Mapping[str, Any] | pa.Table) -> None:
        """Adds rows; once this returns a kill of the process cannot lose them.

        Args:
            columns (`Mapping[str, list | array]` or `pyarrow.Table`):
                Columns of equal length; a 2-D array is a column of fixed-size lists. The first append fixes names
                and types, also for later runs. No rows: nothing happens.

        Raises:
            ValueError: if names or types differ from those of earlier rows.
        """
        table = columns if isinstance(columns, pa.Table) else _as_table(columns)
        if table.num_rows == 0:
            return
        table = _conform(table, self._schema)
        batch = pa.RecordBatch.from_arrays([pa.concat_arrays(c.chunks) for c in table.columns], schema=table.schema)
        self._set_complete(False)
        self._write(batch)
        self._schema = table.schema
        self._rows_in_progress += table.num_rows
        self.num_rows += table.num_rows
        if self._rows_in_progress >= self.rows_per_shard:
            self.seal()

    def seal(self) -> None:
        """Turns this rank's in-progress file, if any, into a sealed shard of few large batches."""
        self.close()
        if self._in_progress_path.exists():  # before all else: if sealing fails, later appends go to another file
            self._number += 1
            self._end = self._rows_in_progress = 0
        self._seal(self._in_progress_shards())

    def truncate(self, column: str, maximum: float) -> int:
        """Drops this rank's rows whose value in `column` exceeds `maximum`: a resumed run makes them again.

        Newest shards go first, so a kill in between leaves a prefix of the rows; calling again completes it.

        Args:
            column (`str`): a numeric column; null values are kept.
            maximum (`float`): the largest value that stays.

        Returns:
            `int`: how many rows were dropped.

        Raises:
            ValueError: if the rows have no such column.
        """
        if self._schema is not None and column not in self._schema.names:
            raise ValueError(f"column={column!r} is not in the store {self.path}; pass one of {self._schema.names}.")
        self.seal()
        before = self.num_rows
        for shard in reversed(self._sealed_shards().values()):
            table = map_sealed(shard)
            batches = table.to_batches()
            masks = [pc.invert(pc.fill_null(pc.greater(batch[column], maximum), False)) for batch in batches]
            num_kept = sum(pc.sum(mask).as_py() or 0 for mask in masks)
            if num_kept == table.num_rows:
                continue
            self._set_complete(False)
            if num_kept:
                kept = (batch.filter(mask) for batch, mask in zip(batches, masks, strict=True))
                self._write_sealed(shard, kept)
            else:
                write_sidecar(shard, [None, *known_versions(shard)], tmp_suffix=self._tmp_suffix)
                shard.unlink()
                sidecar_of(shard).unlink()
            self.num_rows -= table.num_rows - num_kept
        return before - self.num_rows

    def finish(self) -> None:
        """Seals, and on rank 0 marks the store complete: call it there last, after the other ranks."""
        self.seal()
        self._set_complete(True)

    def close(self) -> None:
        """Closes the in-progress file without sealing it. A later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _seal(self, shards: Iterable[Path]) -> None:
        for shard in shards:
            with pa.OSFile(str(shard)) as source:
                self._write_sealed(shard.with_suffix(SEALED), whole_batches(source))
            shard.unlink()

    def _continue(self) -> None:
        """Takes up a file that a killed process left in progress, behind its whole batches, so that the shards become
        those of a run that nobody killed."""
        with pa.OSFile(str(self._in_progress_path)) as source:
            for batch in whole_batches(source):
                self._end, self._schema = source.tell(), batch.schema
                self._rows_in_progress += batch.num_rows
        self.num_rows += self._rows_in_progress

    def _in_progress_shards(self) -> list[Path]:
        """Of this rank, in order; what a sealed shard made stale is deleted."""
        live = list_shards(self.path).values()
        found = sorted(self.path.glob(f"shard-{self.rank:05d}-*{IN_PROGRESS}"))
        for stale in [shard for shard in found if shard not in live]:
            stale.unlink()
        return [shard for shard in found if shard in live]

    @property
    def _in_progress_path(self) -> Path:
        return self.path / f"shard-{self.rank:05d}-{self._number:05d}{IN_PROGRESS}"

    def _open_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        """The manifest of this store, made now if there is none; ranks that race make the same one."""
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = {"schema_version": SCHEMA_VERSION, "complete": False, **given}
        if not (self.path / MANIFEST).exists():
            if shards := list_shards(self.path):
                raise ValueError(
                    f"the folder {self.path} holds {len(shards)} shards of rows, such as "
                    f"{next(iter(shards.values())).name}, but no {MANIFEST} that says what they are. Delete them, or "
                    "pass another folder."
                )
            self._write_manifest(fresh)
        manifest = read_manifest(self.path)
        if differing := differences(manifest["identity"], given["identity"]):
            if not list_shards(self.path):  # a run that failed before its first row binds nobody
                self._write_manifest(fresh)
                return fresh
            raise StoreMismatchError(
                f"the store {self.path} was made with other settings: {differing}. "
                "Pass another folder, or the settings it was made with."
            )
        return manifest

    def _set_complete(self, complete: bool) -> None:
        if self.rank != 0 or self._manifest["complete"] == complete:
            return
        self._manifest["complete"] = complete
        self._manifest.pop("shards", None)
        if complete:  # so that a shard that gets lost is missed
            shards = [path for path in list_shards(self.path).values() if path.suffix == SEALED]
            self._manifest["shards"] = {shard.name: map_sealed(shard).num_rows for shard in shards}
        self._write_manifest(self._manifest)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        """With a digest, and the word that every shard has checksums, unless shards of an older version are there."""
        sealed = [path for path in list_shards(self.path).values() if path.suffix == SEALED]
        value = {**manifest, CHECKSUMS: all(sidecar_of(shard).exists() for shard in sealed)}
        write_sealed_json(self.path / MANIFEST, value, tmp_suffix=self._tmp_suffix)

    def _shards(self) -> dict[int, Path]:
        """{number: path} of this rank, in order."""
        return {number: path for (rank, number), path in list_shards(self.path).items() if rank == self.rank}

    def _sealed_shards(self) -> dict[int, Path]:
        return {number: path for number, path in self._shards().items() if path.suffix == SEALED}

    def _write_sealed(self, shard: Path, batches: Iterable[pa.RecordBatch]) -> None:
        """Writes or replaces a sealed shard, its checksums first; nothing if the batches have no rows."""
        batches = _regrouped(batches)
        first = next(batches, None)
        if first is None:
            return
        with atomic_write(shard, tmp_suffix=self._tmp_suffix) as file:
            hashing = HashingFile(file)
            with pa.ipc.new_stream(hashing, first.schema) as stream:
                for batch in itertools.chain([first], batches):
                    stream.write_batch(batch)
                    hashing.end_batch(batch.num_rows)
            new, old = hashing.version(), known_versions(shard)
            write_sidecar(shard, [new, *old], tmp_suffix=self._tmp_suffix)
        if old:
            write_sidecar(shard, [new], tmp_suffix=self._tmp_suffix)

    def _write(self, batch: pa.RecordBatch) -> None:
        """Adds one batch to the in-progress file, unbuffered: what is written is with the kernel."""
        if self._file is None:
            self._file = open(self._in_progress_path, "ab", buffering=0)  # noqa: SIM115 - stays open between appends
        messages = [batch.serialize()] if self._end else [batch.schema.serialize(), batch.serialize()]
        if self._file.tell() != self._end:
            self._file.truncate(self._end)  # a failed append (disk full, Ctrl-C) left a piece that hides what follows
        for message in messages:
            unwritten = memoryview(message)
            while unwritten:  # the kernel may take less than it is given
                unwritten = unwritten[self._file.write(unwritten) :]
        self._end += sum(message.size for message in messages)


def _regrouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of bounded size, as large as the bounds allow."""
    waiting: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            per_row = max(1, batch.nbytes // batch.num_rows)
            room = min(ROWS_PER_SEALED_BATCH - num_rows, (BYTES_PER_SEALED_BATCH - num_bytes) // per_row)
            piece = batch.slice(start, max(room, 0 if waiting else 1))
            if piece.num_rows:
                waiting.append(piece)
                num_rows, num_bytes = num_rows + piece.num_rows, num_bytes + piece.num_rows * per_row
                start += piece.num_rows
            if start < batch.num_rows:
                yield _combined(waiting)
                waiting, num_rows, num_bytes = [], 0, 0
    if waiting:
        yield _combined(waiting)


def _combined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """One batch of copies, without the buffers that slices share."""
    return pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def _as_table(columns: Mapping[str, Any]) -> pa.Table:
    return pa.table({name: _as_column(name, values) for name, values in columns.items()})


def _as_column(name: str, values: Any) -> Any:
    if isinstance(values, (list, tuple, pa.Array, pa.ChunkedArray)):
        return values
    array = np.asarray(values)  # CPU tensors, too
    if array.ndim not in (1, 2):
        raise ValueError(
            f"columns[{name!r}] has shape {array.shape}; a column needs [rows] or [rows, width]. "
            "Reshape it to [rows, -1]."
        )
    if array.ndim == 1:
        return array
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def _conform(table: pa.Table, schema: pa.Schema | None) -> pa.Table:
    """`table` in the column order of `schema`, or an error that names the columns that differ."""
    if schema is None:
        schema = table.schema
    # A batch is written without its dictionaries, and the type's name shows one at any depth.
    if encoded := [field.name for field in schema if "dictionary<" in str(field.type)]:
        raise ValueError(f"columns {encoded} are dictionary-encoded; cast them to their value type.")
    stored, given = ({field.name: str(field.type) for field in s} for s in (schema, table.schema))
    if differing := differences(stored, given):
        raise ValueError(f"columns differ from the store's: {differing}. Cast them, or write to another folder.")
    return pa.Table.from_arrays([table[name] for name in schema.names], schema=schema)
