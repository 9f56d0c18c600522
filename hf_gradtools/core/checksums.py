"""Checksums of a row store: written before the files they describe, so that a kill at any moment is harmless.

Beside each sealed shard lies a sidecar, `shard-RRRRR-NNNNN.sha256`: for every block of 16 MiB the sha256, and where
each record batch ends, so that a damaged byte is reported with the rows it belongs to. A shard that is rewritten has
both versions in its sidecar while it is replaced. Manifest and sidecars carry a digest of themselves.

Rows in progress have no checksums yet, nor have the shards of stores written by versions without this module.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from .atomic import as_json_bytes, atomic_write
from .shards import (
    CHECKSUMS,
    DIGEST,
    MANIFEST,
    SEALED,
    list_shards,
    map_sealed,
    open_table,
    read_manifest,
    whole_batches,
)


SIDECAR = ".sha256"
BLOCK_BYTES = 16 * 2**20
MAX_NAMED = 8  # damages in one error message


@dataclass(frozen=True)
class Damage:
    """Bytes that are not what was written.

    Attributes:
        file: name of the file within the store.
        what: in words.
        bytes: (first, end) within the file, of the least that the checksums tell apart.
        rows: (first, end) within the store, of the rows that they hold or describe; `None` if it cannot be told.
    """

    file: str
    what: str
    bytes: tuple[int, int]
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", rows {self.rows[0]}-{self.rows[1] - 1} of the store"
        return f"{self.file}: {self.what} (bytes {self.bytes[0]}-{self.bytes[1] - 1}{rows})"


class StoreCorruptError(ValueError):
    """Files of a store are not what was written; `damages` lists every place."""

    def __init__(self, path: Path, damages: list[Damage]) -> None:
        named = "; ".join(map(str, damages[:MAX_NAMED]))
        more = f"; and {len(damages) - MAX_NAMED} more" if len(damages) > MAX_NAMED else ""
        super().__init__(
            f"the store {path} is damaged: {named}{more}. Restore these files from a copy, or write the store again."
        )
        self.damages = damages


@dataclass
class Verified:
    """What [`verify`] found in order, and what has no checksums to compare with."""

    files: int = 0
    bytes: int = 0
    rows: int = 0
    without_checksums: list[str] = field(default_factory=list)


class HashingFile:
    """Passes what is written on to `file` and hashes it by blocks.

    Args:
        file: a binary file open for writing.
    """

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._block = hashlib.sha256()
        self._digests: list[str] = []
        self._in_block = 0
        self.size = 0
        self.batches: list[tuple[int, int]] = []  # (end in bytes, rows up to there)

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.size += len(view)
        while view:
            piece = view[: BLOCK_BYTES - self._in_block]
            self._block.update(piece)
            self._in_block += len(piece)
            view = view[len(piece) :]
            if self._in_block == BLOCK_BYTES:
                self._end_block()
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def end_batch(self, rows: int) -> None:
        """Notes that a record batch of so many rows ends here."""
        before = self.batches[-1][1] if self.batches else 0
        self.batches.append((self.size, before + rows))

    def version(self) -> dict[str, Any]:
        """What the sidecar holds of the file as written so far; to be asked once, at its end."""
        if self._in_block:
            self._end_block()
        return {
            "bytes": self.size,
            "rows": self.batches[-1][1] if self.batches else 0,
            "block_bytes": BLOCK_BYTES,
            "blocks": self._digests,
            "batches": [list(batch) for batch in self.batches],
        }

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block, self._in_block = hashlib.sha256(), 0


def sidecar_of(shard: Path) -> Path:
    """Where the checksums of a sealed shard lie."""
    return shard.with_suffix(SIDECAR)


def write_sidecar(shard: Path, versions: Iterable[dict[str, Any] | None], *, tmp_suffix: str = ".tmp") -> None:
    """Writes what a shard may be: the versions given, `None` for a shard that is not there."""
    write_sealed_json(sidecar_of(shard), {"versions": list(versions)}, tmp_suffix=tmp_suffix)


def versions_of(shard: Path) -> list[dict[str, Any] | None]:
    """What the sidecar of a shard says it may be; nothing if it has no readable sidecar."""
    try:
        found: list[dict[str, Any] | None] = _read_sealed_json(sidecar_of(shard))["versions"]
    except (OSError, ValueError, KeyError):
        return []
    return found


def known_versions(shard: Path) -> list[dict[str, Any] | None]:
    """What a shard that is to be replaced may be: as its sidecar says, or as it is if an older version wrote it."""
    if not shard.exists():
        return []
    if known := versions_of(shard):
        return known
    blocks, size = _hash_blocks(shard, BLOCK_BYTES, lambda count: None)
    rows = map_sealed(shard).num_rows
    return [{"bytes": size, "rows": rows, "block_bytes": BLOCK_BYTES, "blocks": blocks, "batches": [[size, rows]]}]


def write_sealed_json(path: Path, value: dict[str, Any], *, tmp_suffix: str = ".tmp") -> None:
    """Writes JSON with a digest of itself."""
    body = {key: item for key, item in value.items() if key != DIGEST}
    with atomic_write(path, tmp_suffix=tmp_suffix) as file:
        file.write(as_json_bytes({**body, DIGEST: _digest(body)}))


def verify(path: str | os.PathLike[str], on_bytes: Callable[[int], object] = lambda count: None) -> Verified:
    """Reads every sealed byte of a store and compares it with its checksums.

    Args:
        path: of the store.
        on_bytes: called with the number of bytes after each block, for a progress bar.

    Returns:
        [`Verified`]: what was compared. Rows in progress and shards without checksums are named in it.

    Raises:
        StoreCorruptError: names file, bytes and rows of all that differs, is cut or is missing.
        ValueError: if the folder holds no store.
    """
    path = Path(path)
    report = Verified()
    damages: list[Damage] = []
    manifest = _check_manifest(path, report, damages)
    shards = list_shards(path)
    live = {shard.stem for shard in shards.values()}
    lost = [sidecar.with_suffix(SEALED) for sidecar in path.glob(f"shard-*{SIDECAR}") if sidecar.stem not in live]
    lost += [path / name for name in manifest.get("shards", {}) if Path(name).stem not in live]
    for shard in sorted({*shards.values(), *lost}, key=_place):
        if shard.suffix == SEALED:
            _check_shard(shard, manifest, report, damages, on_bytes)
        else:
            report.without_checksums.append(shard.name)
            with pa.OSFile(str(shard)) as source:
                report.rows += sum(batch.num_rows for batch in whole_batches(source))
    if damages:
        raise StoreCorruptError(path, damages)
    return report


def _place(shard: Path) -> tuple[int, int]:
    _, rank, number = shard.stem.split("-")
    return int(rank), int(number)


def _check_manifest(path: Path, report: Verified, damages: list[Damage]) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = _read_sealed_json(file)
        report.files += 1
        report.bytes += file.stat().st_size
    except FileNotFoundError:
        return read_manifest(path)  # raises: no store
    except (ValueError, KeyError):
        content = file.read_bytes()
        if _is_of_older_version(content):
            report.without_checksums.append(file.name)
            return read_manifest(path)
        damages.append(Damage(file.name, "is not what was written", (0, len(content))))
        manifest = {}
    return manifest


def _is_of_older_version(content: bytes) -> bool:
    """Whether these are the bytes of a manifest that was written without a digest."""
    try:
        manifest = json.loads(content)
    except ValueError:
        return False
    keys = {"schema_version", "complete", "identity", "extra"}
    return isinstance(manifest, dict) and set(manifest) == keys and as_json_bytes(manifest) == content


def _check_shard(
    shard: Path,
    manifest: dict[str, Any],
    report: Verified,
    damages: list[Damage],
    on_bytes: Callable[[int], object],
) -> None:
    sidecar, first_row = sidecar_of(shard), report.rows
    try:
        versions = _read_sealed_json(sidecar)["versions"]
        report.files += 1
    except FileNotFoundError:
        _check_without_sidecar(shard, manifest, report, damages, on_bytes)
        return
    except (ValueError, KeyError):
        report.rows += _count_rows(shard, manifest)
        size = sidecar.stat().st_size
        damages.append(Damage(sidecar.name, "is not what was written", (0, size), (first_row, report.rows)))
        return
    block_bytes = next((known["block_bytes"] for known in versions if known), BLOCK_BYTES)
    found, size = _hash_blocks(shard, block_bytes, on_bytes) if shard.exists() else (None, 0)
    matching = [known for known in versions if _matches(known, found, size)]
    if matching:
        report.files += found is not None
        report.bytes += size
        report.rows += matching[0]["rows"] if matching[0] else 0
        return
    known = next((known for known in versions if known and known["bytes"] == size), versions[0] or versions[-1])
    report.rows += known["rows"] if known else 0
    damages += _damages(shard, known, found, size, first_row)


def _check_without_sidecar(
    shard: Path, manifest: dict[str, Any], report: Verified, damages: list[Damage], on_bytes: Callable[[int], object]
) -> None:
    """A shard of an older version at least has to be a whole Arrow stream; of newer ones the sidecar is missing."""
    first_row = report.rows
    report.rows += _count_rows(shard, manifest)
    rows = (first_row, report.rows)
    size = shard.stat().st_size if shard.exists() else 0
    if not shard.exists():
        damages.append(Damage(shard.name, "is missing", (0, 1), rows))
    elif manifest.get(CHECKSUMS):
        damages.append(Damage(sidecar_of(shard).name, "is missing", (0, 1), rows))
    elif not _is_whole_stream(shard):
        damages.append(Damage(shard.name, "is cut or unreadable", (0, size)))
    else:
        report.without_checksums.append(shard.name)
    on_bytes(size)


def _count_rows(shard: Path, manifest: dict[str, Any]) -> int:
    """As the manifest of a complete store says, else as the shard itself does."""
    listed = manifest.get("shards", {}).get(shard.name)
    if listed is not None:
        return int(listed)
    try:
        num_rows: int = open_table(shard).num_rows
    except (pa.ArrowInvalid, OSError):
        return 0
    return num_rows


def _is_whole_stream(shard: Path) -> bool:
    """Whether every message is there, up to the marker that ends the stream."""
    try:
        with pa.OSFile(str(shard)) as source:
            for _ in pa.ipc.open_stream(source):
                pass
            return bool(source.tell() == source.size()) and source.size() > 0
    except (pa.ArrowInvalid, OSError):
        return False


def _hash_blocks(shard: Path, block_bytes: int, on_bytes: Callable[[int], object]) -> tuple[list[str], int]:
    buffer, digests, size = memoryview(bytearray(block_bytes)), [], 0
    with open(shard, "rb", buffering=0) as file:
        while count := _read_into(file, buffer):
            digests.append(hashlib.sha256(buffer[:count]).hexdigest())
            size += count
            on_bytes(count)
    return digests, size


def _read_into(file: Any, buffer: memoryview) -> int:
    """Fills the buffer, unless the file ends before."""
    filled = 0
    while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
        filled += count
    return filled


def _matches(known: dict[str, Any] | None, found: list[str] | None, size: int) -> bool:
    if known is None or found is None:
        return known is None and found is None
    return bool(known["bytes"] == size and known["blocks"] == found)


def _damages(
    shard: Path, known: dict[str, Any] | None, found: list[str] | None, size: int, first_row: int
) -> list[Damage]:
    """Each stretch of blocks that differs, and what is missing or too much at the end."""
    if known is None:
        return [Damage(shard.name, "should not be there", (0, size))]
    expected, block = known["bytes"], known["block_bytes"]

    def rows(start: int, end: int) -> tuple[int, int] | None:
        inside = _rows_of(known["batches"], start, end)
        return inside and (first_row + inside[0], first_row + inside[1])

    if found is None:
        return [Damage(shard.name, "is missing", (0, expected), rows(0, expected))]
    damages = []
    for number, (old, new) in enumerate(zip(known["blocks"], found, strict=False)):
        start, end = number * block, min((number + 1) * block, expected)
        cut_or_extended = size != expected and (end > size or end % block)  # told of below
        if old != new and not cut_or_extended:
            damages.append(Damage(shard.name, "is not what was written", (start, end), rows(start, end)))
    if size < expected:
        damages.append(Damage(shard.name, "is cut", (size, expected), rows(size, expected)))
    elif size > expected:
        damages.append(Damage(shard.name, "has bytes after its end", (expected, size)))
    return damages


def _rows_of(batches: list[list[int]], start: int, end: int) -> tuple[int, int] | None:
    """The rows (first, end) of the batches that have bytes in [start, end): all rows for the schema before them."""
    ends = [batch[0] for batch in batches]
    first, last = bisect_right(ends, start), bisect_left(ends, end)
    if first == len(batches):
        return None  # the marker that ends the stream
    return (batches[first - 1][1] if first else 0, batches[min(last, len(batches) - 1)][1])


def _read_sealed_json(path: Path) -> dict[str, Any]:
    """Reads JSON that carries its own digest, and must be byte for byte what was written.

    Raises:
        FileNotFoundError, ValueError, KeyError: it is not there, or damaged, or has no digest.
    """
    content = path.read_bytes()
    value = json.loads(content)
    if not isinstance(value, dict) or as_json_bytes(value) != content:
        raise ValueError(f"{path} is not what was written")
    body = {key: item for key, item in value.items() if key != DIGEST}
    if value[DIGEST] != _digest(body):
        raise ValueError(f"{path} is not what was written")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(as_json_bytes(body)).hexdigest()
