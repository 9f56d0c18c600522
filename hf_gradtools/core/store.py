"""Rows on disk that survive a kill at any moment: append, resume, merge ranks, read back as `datasets.Dataset`.

A store is a folder:

    manifest.json                 what the rows are (`identity`) and whether they are all there (`complete`)
    shard-00000-00000.arrow       rank 0, shard 0: sealed, memory-mapped by readers
    shard-00000-00001.inprogress  rank 0, shard 1: grows by one record batch per append

Both kinds of shard are Arrow IPC streams. The folder listing is the truth about the rows, the manifest only about
their identity, so nothing has to be kept in step. Three rules make every moment a good one to be killed in:

- an append is one write at the end of the file, so a kill leaves whole batches and at most one torn tail, which
  readers ignore;
- every other file appears under its name by `os.replace`, whole and on disk;
- a sealed shard makes the in-progress file of the same rank and number stale, whether or not it is deleted yet.

They hold for a killed process. After a power failure sealed shards are whole too, but the in-progress file may have
lost appends that the kernel had not written back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


if TYPE_CHECKING:
    from io import FileIO

    from datasets import Dataset
    from typing_extensions import Self


__all__ = [
    "RowStore",
    "StoreMismatchError",
    "atomic_write",
    "read_dataset",
    "read_manifest",
    "read_table",
    "write_json_atomically",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEALED, IN_PROGRESS = ".arrow", ".inprogress"
SHARD_NAME = re.compile(r"shard-(\d+)-(\d+)\.(arrow|inprogress)")
ROWS_PER_SEALED_BATCH = 10_000  # few batches for fast random access, yet a bounded copy while sealing
LISTING_ATTEMPTS = 20


class StoreMismatchError(ValueError):
    """The folder holds rows made with other settings than those given."""


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
        self._manifest = self._open_manifest(_as_json({"identity": identity, "extra": extra or {}}))
        self.complete: bool = self._manifest["complete"]
        self._file: FileIO | None = None
        self._number = 0  # of the in-progress file, which exists from the first append on
        self._end = 0  # bytes of whole batches in it
        self._rows_in_progress = 0

        for leftover in self.path.glob(f"*{self._tmp_suffix}"):
            leftover.unlink()
        self.seal()  # what a killed process left in progress
        sealed = self._sealed_shards()
        tables = [_map_sealed(shard) for shard in sealed.values()]
        self.num_rows: int = sum(table.num_rows for table in tables)
        self._schema: pa.Schema | None = tables[0].schema if tables else None
        self._number = max(sealed, default=-1) + 1

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
        live = _list_shards(self.path).values()
        for shard in self.path.glob(f"shard-{self.rank:05d}-*{IN_PROGRESS}"):
            table = _whole_batches(pa.memory_map(str(shard)))
            if table.num_rows and shard in live:
                self._write_sealed(shard.with_suffix(SEALED), table)
            shard.unlink()

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
            table = _map_sealed(shard)
            kept = table.filter(pc.invert(pc.fill_null(pc.greater(table[column], maximum), False)))
            if kept.num_rows == table.num_rows:
                continue
            self._set_complete(False)
            if kept.num_rows:
                self._write_sealed(shard, kept)
            else:
                shard.unlink()
            self.num_rows -= table.num_rows - kept.num_rows
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

    @property
    def _in_progress_path(self) -> Path:
        return self.path / f"shard-{self.rank:05d}-{self._number:05d}{IN_PROGRESS}"

    def _open_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        """The manifest of this store, made now if there is none; ranks that race make the same one."""
        self.path.mkdir(parents=True, exist_ok=True)
        fresh = {"schema_version": SCHEMA_VERSION, "complete": False, **given}
        if not (self.path / MANIFEST).exists():
            write_json_atomically(self.path / MANIFEST, fresh, tmp_suffix=self._tmp_suffix)
        manifest = read_manifest(self.path)
        if differing := _differences(manifest["identity"], given["identity"]):
            if not _list_shards(self.path):  # a run that failed before its first row binds nobody
                write_json_atomically(self.path / MANIFEST, fresh, tmp_suffix=self._tmp_suffix)
                return fresh
            raise StoreMismatchError(
                f"the store {self.path} was made with other settings: {differing}. "
                "Pass another folder, or the settings it was made with."
            )
        return manifest

    def _set_complete(self, complete: bool) -> None:
        if self.rank == 0 and self._manifest["complete"] != complete:
            self._manifest["complete"] = complete
            write_json_atomically(self.path / MANIFEST, self._manifest, tmp_suffix=self._tmp_suffix)

    def _sealed_shards(self) -> dict[int, Path]:
        """{number: path} of this rank, in order."""
        shards = _list_shards(self.path).items()
        return {number: path for (rank, number), path in shards if rank == self.rank and path.suffix == SEALED}

    def _write_sealed(self, shard: Path, table: pa.Table) -> None:
        with (
            atomic_write(shard, tmp_suffix=self._tmp_suffix) as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            for start in range(0, table.num_rows, ROWS_PER_SEALED_BATCH):
                stream.write_table(table.slice(start, ROWS_PER_SEALED_BATCH).combine_chunks())

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


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the manifest of a store: `schema_version`, `identity`, `complete`, `extra`.

    Raises:
        ValueError: if the folder holds no store, or one of another schema version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        version = manifest["schema_version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"path={str(path)!r} holds no row store: no readable {file} with a schema_version ({error!r}). "
            "Pass the output folder of a run."
        ) from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema_version {version!r}, this hf_gradtools reads {SCHEMA_VERSION}. "
            "Use the version of hf_gradtools that wrote it."
        )
    return manifest


def read_table(path: str | os.PathLike[str]) -> pa.Table:
    """Reads a store, also one that is being written: sealed shards memory-mapped, rows in progress in memory.

    Returns:
        `pyarrow.Table`: the rows of all ranks in order of (rank, append); no columns if there are no rows yet.

    Raises:
        ValueError: if the folder holds no store.
    """
    tables = _open_shards(path, _open_table)
    return pa.concat_tables(tables) if tables else pa.table({})


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Like `read_table`, as a `datasets.Dataset`."""
    from datasets import Dataset, concatenate_datasets

    def open_dataset(shard: Path) -> Dataset:
        return Dataset.from_file(str(shard)) if shard.suffix == SEALED else Dataset(_open_table(shard))

    parts = _open_shards(path, open_dataset)
    return concatenate_datasets(parts) if parts else Dataset.from_dict({})


@contextlib.contextmanager
def atomic_write(path: Path, *, tmp_suffix: str = ".tmp") -> Iterator[BinaryIO]:
    """Opens a file to write that appears at `path` whole and on disk when the block ends, or not at all.

    Args:
        path (`Path`): the file to make or replace.
        tmp_suffix (`str`, defaults to `".tmp"`): ending of the name it is written under; processes that may write
            the same `path` at the same time each need their own.
    """
    tmp = path.with_name(path.name + tmp_suffix)
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, is on disk
    finally:
        os.close(folder)


def write_json_atomically(path: Path, value: Any, *, tmp_suffix: str = ".tmp") -> None:
    """Writes `value` as indented JSON through [`atomic_write`]."""
    with atomic_write(path, tmp_suffix=tmp_suffix) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def _open_shards(path: str | os.PathLike[str], open_shard: Callable[[Path], Any]) -> list[Any]:
    """Opens all shards that have rows, listing again when the writer moves them under our hands."""
    read_manifest(path)
    for _ in range(LISTING_ATTEMPTS):
        shards = _list_shards(Path(path))
        if shards != _list_shards(Path(path)):
            continue  # a listing made while a shard is sealed may show neither of its two names
        try:
            opened = [open_shard(shard) for shard in shards.values()]
        except FileNotFoundError:
            continue
        return [part for part in opened if part.num_rows]
    raise RuntimeError(f"the shards of {path} changed during each of {LISTING_ATTEMPTS} readings; read it again.")


def _list_shards(path: Path) -> dict[tuple[int, int], Path]:
    """{(rank, number): file} in order; a sealed shard hides the in-progress file that it was made from."""
    shards: dict[tuple[int, int], Path] = {}
    for file in sorted(path.iterdir()):  # ".arrow" comes before ".inprogress"
        if match := SHARD_NAME.fullmatch(file.name):
            shards.setdefault((int(match[1]), int(match[2])), file)
    return dict(sorted(shards.items()))


def _open_table(shard: Path) -> pa.Table:
    # The writer may cut an in-progress file, so it is copied: reading a cut memory map would kill the process.
    return _map_sealed(shard) if shard.suffix == SEALED else _whole_batches(pa.py_buffer(shard.read_bytes()))


def _map_sealed(shard: Path) -> pa.Table:
    with pa.memory_map(str(shard)) as source:
        return pa.ipc.open_stream(source).read_all()


def _whole_batches(source: pa.Buffer | pa.NativeFile) -> pa.Table:
    """The rows before the torn tail of a stream in memory, where any read error means that bytes are missing."""
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError):
        return pa.table({})
    batches = []
    with contextlib.suppress(StopIteration, pa.ArrowInvalid, OSError):
        while True:
            batches.append(reader.read_next_batch())
    return pa.Table.from_batches(batches, reader.schema)


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
    if differing := _differences(stored, given):
        raise ValueError(f"columns differ from the store's: {differing}. Cast them, or write to another folder.")
    return pa.Table.from_arrays([table[name] for name in schema.names], schema=schema)


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Names each key whose values differ; empty if none does."""
    pairs = {key: (stored.get(key, "<absent>"), given.get(key, "<absent>")) for key in {**stored, **given}}
    return "; ".join(f"{key}: stored {old!r}, given {new!r}" for key, (old, new) in pairs.items() if old != new)


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it will read back (tuples become lists), so that stored and given compare equal."""
    try:
        normalised: dict[str, Any] = json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{value} must hold JSON values only ({error}). Pass str() of such a value.") from error
    return normalised
