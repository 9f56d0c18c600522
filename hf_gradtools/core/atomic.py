"""Files that appear under their name whole and on disk, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


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


def as_json_bytes(value: Any) -> bytes:
    """`value` as indented JSON, as [`write_json_atomically`] writes it."""
    return json.dumps(value, indent=2).encode() + b"\n"


def write_json_atomically(path: Path, value: Any, *, tmp_suffix: str = ".tmp") -> None:
    """Writes `value` as indented JSON through [`atomic_write`]."""
    with atomic_write(path, tmp_suffix=tmp_suffix) as file:
        file.write(as_json_bytes(value))


def rename_unless_there(unfinished: Path, folder: Path) -> None:
    """Gives a finished folder its name, unless another process that made the same was faster."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
