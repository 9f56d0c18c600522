"""Readings on disk: one safetensors file, or a file per chunk of texts, each with a checksum; a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.ghosttrack.array_files import read_arrays, write_arrays
from hf_gradtools.ghosttrack.reading.reading import Reading, TokenRow
from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses


__all__ = ["load_reading", "read_in_chunks", "save_reading"]

WHOLE, MANIFEST, KIND = "reading.safetensors", "reading.json", "reading"
FORMAT = {"format": "hf_gradtools.reading", "version": 1}
HYPOTHESES = ("features", "activations", "positions", "lengths")
SPARSE = ("data", "indices", "indptr")
SAMPLED = 1024  # first numbers of each parameter that go into a module's fingerprint


def save_reading(reading: Reading, folder: str | os.PathLike[str]) -> None:
    """Writes a reading as `reading.safetensors`; see [`Reading.save`]."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(reading, Path(folder) / WHOLE)


def load_reading(folder: str | os.PathLike[str]) -> Reading:
    """Reads `reading.safetensors` or all chunks of a finished run; see [`Reading.load`]."""
    folder = Path(folder)
    if (folder / WHOLE).is_file():
        return _read(folder / WHOLE)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} has no reading. Pass the folder of Reading.save or of read_texts.")
    manifest = _manifest(folder)
    chunks = [folder / _name(number) for number in range(manifest["chunks"])]
    missing = [chunk.name for chunk in chunks if not chunk.is_file()]
    if missing:
        raise ValueError(
            f"{folder} has {len(chunks) - len(missing)} of {len(chunks)} chunks, {missing[0]} is missing: the reading "
            "was not finished. Run read_texts with the same output_dir; it goes on from there."
        )
    return Reading.concatenate([_read(chunk) for chunk in chunks])


def read_in_chunks(
    folder: str | os.PathLike[str],
    read: Callable[[Sequence[TokenRow]], Reading],
    rows: Sequence[TokenRow],
    modules: Sequence[nn.Module],
    settings: Mapping[str, Any],
    chunk_texts: int,
    progress: bool,
) -> Reading:
    """Reads the chunks that `folder` lacks, and loads all.

    Args:
        folder (`str` or `os.PathLike`): made if absent.
        read (`Callable`): what makes a reading of rows.
        rows (`Sequence[TokenRow]`): of all texts.
        modules (`Sequence[nn.Module]`): what reads them, the model and its autoencoders.
        settings (`Mapping`): what else the result depends on, as JSON has it.
        chunk_texts (`int`): texts of a chunk.
        progress (`bool`): show a bar.

    Raises:
        ValueError: the folder holds another reading, or a chunk is damaged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), chunk_texts)
    manifest = FORMAT | {"texts": len(rows), "chunk_texts": chunk_texts, "chunks": len(starts)}
    manifest |= {"sha256": _digest_of_work(rows, modules, settings)}
    if (folder / MANIFEST).is_file():
        if _manifest(folder) != manifest:
            raise ValueError(
                f"output_dir={str(folder)!r} holds the reading of other texts, another model, other autoencoders or "
                "other settings. Pass an empty folder, or the arguments that it was begun with."
            )
    else:
        write_json_atomically(folder / MANIFEST, manifest)
    parts = []
    for number, start in enumerate(tqdm(starts, desc="Reading chunks of texts", disable=not progress)):
        path = folder / _name(number)
        if not path.is_file():
            _write(read(rows[start : start + chunk_texts]), path)
        parts.append(_read(path))
    return Reading.concatenate(parts)


def _name(number: int) -> str:
    return f"chunk-{number:05d}.safetensors"


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}). Delete the folder and read again.") from error
    if not isinstance(manifest, dict) or FORMAT.items() - manifest.items() or type(manifest.get("chunks")) is not int:
        raise ValueError(f"{folder / MANIFEST} is no reading of version {FORMAT['version']}. Pass another folder.")
    return manifest


def _digest_of_work(rows: Sequence[TokenRow], modules: Sequence[nn.Module], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([rows, settings], sort_keys=True).encode())
    for module in modules:
        digest.update(type(module).__name__.encode())
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _write(reading: Reading, path: Path) -> None:
    arrays = {f"hypotheses.{name}": getattr(reading.hypotheses, name) for name in HYPOTHESES}
    arrays["spans"] = reading.spans
    widths = {}
    for hookpoint, latents in reading.pooled.items():
        arrays |= {f"pooled.{hookpoint}.{name}": getattr(latents, name) for name in SPARSE}
        widths[hookpoint] = latents.shape[1]
    for kind, by_hookpoint in reading.hidden.items():
        arrays |= {f"hidden.{kind}.{hookpoint}": states for hookpoint, states in by_hookpoint.items()}
    header = FORMAT | {"hookpoints": reading.hookpoints, "d_sae": widths, "hidden": list(reading.hidden)}
    write_arrays(path, KIND, header, arrays)


def _read(path: Path) -> Reading:
    try:
        return _assemble(*read_arrays(path, KIND))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no reading ({error}). Delete it and read its texts again.") from error


def _assemble(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Reading:
    from scipy.sparse import csr_matrix

    layers, n_texts = header["hookpoints"], len(arrays["spans"])
    hypotheses = Hypotheses(*(arrays[f"hypotheses.{name}"] for name in HYPOTHESES), layers)
    pooled = {
        key: csr_matrix(
            tuple(arrays[f"pooled.{key}.{name}"] for name in SPARSE), shape=(n_texts, header["d_sae"][key])
        )
        for key in layers
    }
    hidden = {kind: {key: arrays[f"hidden.{kind}.{key}"] for key in layers} for kind in header["hidden"]}
    return Reading(hypotheses, pooled, arrays["spans"], hidden)
