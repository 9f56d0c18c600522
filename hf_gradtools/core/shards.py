"""The reading side of a row store: its files, its manifest, its rows (`core/store.py` writes them)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa


if TYPE_CHECKING:
    from datasets import Dataset


SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEALED, IN_PROGRESS = ".arrow", ".inprogress"
SHARD_NAME = re.compile(r"shard-(\d+)-(\d+)\.(arrow|inprogress)")
LISTING_ATTEMPTS = 20
MAX_DIFFERENCES, MAX_SHOWN = 8, 120  # in an error
DIGEST = "digest"  # of the file that holds it; core/checksums.py
CHECKSUMS = "checksums"


class StoreMismatchError(ValueError):
    """The folder holds rows made with other settings than those given."""


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the manifest of a store: `schema_version`, `identity`, `complete`, `extra`; `shards` of a complete one.

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
    return {key: value for key, value in manifest.items() if key not in (DIGEST, CHECKSUMS)}


def read_table(path: str | os.PathLike[str]) -> pa.Table:
    """Reads a store, also one that is being written: sealed shards memory-mapped, rows in progress in memory.

    Returns:
        `pyarrow.Table`: the rows of all ranks in order of (rank, append); no columns if there are no rows yet.

    Raises:
        ValueError: if the folder holds no store.
    """
    tables = [table for table in open_shards(path, open_table) if table.num_rows]
    return pa.concat_tables(tables) if tables else pa.table({})


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Like `read_table`, as a `datasets.Dataset`."""
    from datasets import Dataset, concatenate_datasets

    def open_dataset(shard: Path) -> Dataset:
        return Dataset.from_file(str(shard)) if shard.suffix == SEALED else Dataset(open_table(shard))

    parts = [part for part in open_shards(path, open_dataset) if part.num_rows]
    return concatenate_datasets(parts) if parts else Dataset.from_dict({})


def open_shards(path: str | os.PathLike[str], open_shard: Callable[[Path], Any]) -> list[Any]:
    """What `open_shard` returns for each shard, listing again when the writer moves them under our hands."""
    read_manifest(path)
    for _ in range(LISTING_ATTEMPTS):
        shards = list_shards(Path(path))
        if shards != list_shards(Path(path)):
            continue  # a listing made while a shard is sealed may show neither of its two names
        try:
            return [open_shard(shard) for shard in shards.values()]
        except FileNotFoundError:
            continue
    raise RuntimeError(f"the shards of {path} changed during each of {LISTING_ATTEMPTS} readings; read it again.")


def list_shards(path: Path) -> dict[tuple[int, int], Path]:
    """{(rank, number): file} in order; a sealed shard hides the in-progress file that it was made from."""
    shards: dict[tuple[int, int], Path] = {}
    for file in sorted(path.iterdir()):  # ".arrow" comes before ".inprogress"
        if match := SHARD_NAME.fullmatch(file.name):
            shards.setdefault((int(match[1]), int(match[2])), file)
    return dict(sorted(shards.items()))


def open_table(shard: Path) -> pa.Table:
    """The rows of a shard: of a sealed one memory-mapped, of one in progress the whole batches, in memory."""
    # The writer may cut an in-progress file, so it is copied: reading a cut memory map would kill the process.
    return map_sealed(shard) if shard.suffix == SEALED else pa.Table.from_batches(*_collected(shard))


def map_sealed(shard: Path) -> pa.Table:
    """The rows of a sealed shard, memory-mapped."""
    with pa.memory_map(str(shard)) as source:
        return pa.ipc.open_stream(source).read_all()


def whole_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The batches before the torn tail of a stream, one at a time; any read error means that bytes are missing."""
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError):
        return
    while True:
        try:
            batch = reader.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return
        yield batch


def _collected(shard: Path) -> tuple[list[pa.RecordBatch], pa.Schema]:
    with pa.OSFile(str(shard)) as source:
        batches = list(whole_batches(source))
    return batches, batches[0].schema if batches else pa.schema([])


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Names each key whose values differ, in nested mappings too; empty if none does."""
    found = list(_differing("", stored, given))
    more = f"; and {len(found) - MAX_DIFFERENCES} more" if len(found) > MAX_DIFFERENCES else ""
    return "; ".join(found[:MAX_DIFFERENCES]) + more


def _differing(prefix: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for key in {**stored, **given}:
        old, new = (values.get(key, "<absent>") for values in (stored, given))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(f"{prefix}{key}.", old, new)
        elif old != new:
            yield f"{prefix}{key}: stored {_shown(old)}, given {_shown(new)}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}…"


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as it will read back (tuples become lists), so that stored and given compare equal.

    Raises:
        ValueError: if it holds more than JSON values.
    """
    try:
        normalised: dict[str, Any] = json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(f"{value} must hold JSON values only ({error}). Pass str() of such a value.") from error
    return normalised
