"""`meta.pkl` of nanoGPT's data folders, read without running what a pickle may ask to run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO


__all__ = ["read_meta_pickle"]

# What the unpickler raises on a file that is refused, cut off or no pickle at all.
BROKEN = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError,
)  # fmt: skip
MOST_BYTES = 1 << 25  # the largest vocabularies take a few MiB


class _PlainUnpickler(pickle._Unpickler):
    """Builds dicts, lists, tuples, texts and numbers. Whatever needs a class or a function is refused by name.

    It is the one in Python: that in C gives a file of ten bytes as much memory as the number of an entry asks for.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, and only plain containers are read")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an object stored elsewhere, and only plain containers are read")


def read_meta_pickle(path: Path) -> dict[str, Any]:
    """What nanoGPT's `prepare.py` wrote: `vocab_size`, and for characters `stoi` and `itos`.

    Args:
        path (`Path`): of `meta.pkl`.

    Returns:
        `dict[str, Any]`: of it, `vocab_size` is a positive `int`.

    Raises:
        ValueError: the file is broken, holds anything but plain containers (nothing of it is executed), or does not
            say how large the vocabulary is.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, too many for a meta.pkl. Prepare the data anew.")
    with open(path, "rb") as file:
        meta = _load(file, path)
    if not isinstance(meta, dict):
        raise ValueError(f"{path} holds a {type(meta).__name__}; nanoGPT's meta.pkl is a dict. Prepare the data anew.")
    size = meta.get("vocab_size", len(meta["itos"]) if isinstance(meta.get("itos"), (dict, list)) else None)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{path} has vocab_size={size!r}; a positive number is needed. Prepare the data anew.")
    return {**meta, "vocab_size": size}


def _load(file: BinaryIO, path: Path) -> Any:
    try:
        return _PlainUnpickler(file).load()
    except BROKEN as error:
        raise ValueError(
            f"{path} was not read: {str(error).rstrip('.') or type(error).__name__}. Nothing of it was executed. "
            "Prepare the data anew, which writes meta.json instead."
        ) from error
