"""Tracks and their detection features on disk: one safetensors file with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.track_features import FEATURE_SETS, detection_features
from hf_gradtools.ghosttrack.tracking.tracking import Tracks


__all__ = ["StoredTracks", "load_tracks", "save_tracks"]

ARRAYS = ("track_id", "previous", "similarity", "cost")
FEATURES = "features."


@dataclass(frozen=True, eq=False)
class StoredTracks:
    """Tracks, and by feature set the features `[T, P]` that follow from them with their names."""

    tracks: Tracks
    features: dict[str, tuple[np.ndarray, list[str]]]


def save_tracks(tracks: Tracks, path: str | os.PathLike[str]) -> None:
    """Writes tracks, without their hypotheses, and all detection features, whole or not at all."""
    arrays = {name: np.ascontiguousarray(getattr(tracks, name)) for name in ARRAYS}
    names = {}
    for kind in FEATURE_SETS:
        arrays[FEATURES + kind], names[kind] = detection_features(tracks, kind)
    described = {"names": names, "layers": tracks.hypotheses.layers}
    described["sha256"] = _digest(described, arrays)
    with atomic_write(Path(path)) as file:  # one entry of metadata: safetensors writes several in any order
        file.write(save(arrays, {"tracks": json.dumps(described)}))


def load_tracks(path: str | os.PathLike[str], hypotheses: Hypotheses) -> StoredTracks:
    """Reads what [`save_tracks`] wrote.

    Args:
        path (`str` or `os.PathLike`): the file.
        hypotheses (`Hypotheses`): those that were tracked; more of each layer may be there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or of other texts or layers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist. Run `hf-gradtools ghosttrack track` first.")
    try:
        with safe_open(str(path), framework="np") as file:
            described = json.loads((file.metadata() or {})["tracks"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if described.pop("sha256") != _digest(described, arrays):
            raise ValueError("its content differs from its SHA-256")
        names = {kind: list(described["names"][kind]) for kind in FEATURE_SETS}
        width = arrays["track_id"].shape[2]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds no tracks ({error}). Delete it, and track again.") from error
    parts = (hypotheses.features, hypotheses.activations, hypotheses.positions)
    features, activations, positions = (array[:, :, :width] for array in parts)
    if described["layers"] != hypotheses.layers or features.shape != arrays["track_id"].shape:
        raise ValueError(
            f"{path} holds tracks {list(arrays['track_id'].shape)} of {described['layers']}; the hypotheses are "
            f"{list(hypotheses.features.shape)} of {hypotheses.layers}. Track again."
        )
    strongest = Hypotheses(features, activations, positions, hypotheses.lengths, hypotheses.layers)
    tracks = Tracks(strongest, *(arrays[name] for name in ARRAYS))
    return StoredTracks(tracks, {kind: (arrays[FEATURES + kind], names[kind]) for kind in FEATURE_SETS})


def _digest(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(described).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
