"""Tracks and their detection features on disk: one safetensors file with a checksum."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_gradtools.ghosttrack.array_files import read_arrays, write_arrays
from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses
from hf_gradtools.ghosttrack.tracking.track_features import FEATURE_SETS, detection_features
from hf_gradtools.ghosttrack.tracking.tracking import Tracks


__all__ = ["StoredTracks", "load_tracks", "save_tracks"]

ARRAYS = ("track_id", "previous", "similarity", "cost")
FEATURES, KIND = "features.", "tracks"


@dataclass(frozen=True, eq=False)
class StoredTracks:
    """Tracks, and by feature set the features `[T, P]` that follow from them with their names."""

    tracks: Tracks
    features: dict[str, tuple[np.ndarray, list[str]]]


def save_tracks(tracks: Tracks, path: str | os.PathLike[str]) -> None:
    """Writes tracks, without their hypotheses, and all detection features, whole or not at all."""
    arrays = {name: getattr(tracks, name) for name in ARRAYS}
    names = {}
    for kind in FEATURE_SETS:
        arrays[FEATURES + kind], names[kind] = detection_features(tracks, kind)
    described = {"names": names, "layers": tracks.hypotheses.layers}
    write_arrays(Path(path), KIND, described, arrays)


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
        described, arrays = read_arrays(Path(path), KIND)
        names = {kind: list(described["names"][kind]) for kind in FEATURE_SETS}
        width = arrays["track_id"].shape[2]
    except (KeyError, ValueError) as error:
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
