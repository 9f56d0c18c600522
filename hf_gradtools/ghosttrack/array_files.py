"""Named arrays with a JSON header in one safetensors file: written whole or not at all, checked by a SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hf_gradtools.core.atomic import atomic_write


__all__ = ["read_arrays", "write_arrays"]


def write_arrays(path: Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays and a header, which is kept as the file's metadata under the name of the `kind`."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    described = {**header, "sha256": _digest(header, arrays)}
    with atomic_write(path, tmp_suffix=f".{os.getpid()}.tmp") as file:
        file.write(save(arrays, {kind: json.dumps(described)}))  # one entry: the order of several is arbitrary


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays that [`write_arrays`] wrote.

    Raises:
        ValueError: the file is damaged, or of another kind; it says how, for an error that says what to do.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            header = json.loads((file.metadata() or {})[kind])
            expected = header.pop("sha256")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error
    if _digest(header, arrays) != expected:
        raise ValueError("its content differs from its SHA-256")
    return header, arrays


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
