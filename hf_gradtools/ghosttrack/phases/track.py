"""Phase 3: what the autoencoders see in the labelled answers, and its tracks, to `<results_dir>/tracking/<data set>`.

reading/                    hypotheses, pooled latents and hidden states of the texts, in chunks
tracks-hungarian.safetensors, tracks-random.safetensors, ...
finished.json
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.ghosttrack.phases.common import (
    Layers,
    PhaseSummary,
    begin,
    finish,
    hookpoints_of,
    is_finished,
    load_language_model,
    remove,
    results_folder,
)


if TYPE_CHECKING:
    import numpy as np

    from hf_gradtools.ghosttrack.answers.detection_rows import DetectionRows
    from hf_gradtools.ghosttrack.reading.reading import Reading
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
    from hf_gradtools.ghosttrack.tracking.track_files import StoredTracks
    from hf_gradtools.sae.modeling_sae import SAE


__all__ = [
    "NULLS",
    "TrackedData",
    "associations",
    "load_rows_of",
    "load_saes",
    "load_tracked",
    "track_hypotheses",
    "transport_maps",
]

logger = logging.getLogger(__name__)

NULLS = ("shuffled", "random", "none")
READING = "reading"
COUNTED_TOKENS = 200_000  # of the hidden states on disk, for co-activation


@dataclass(frozen=True, eq=False)
class TrackedData:
    """What phase 3 left of a data set.

    Attributes:
        rows ([`DetectionRows`]): the data set.
        reading ([`Reading`]): of its texts.
        tracks (`dict[str, StoredTracks]`): by association, the configuration's first.
        identity (`dict[str, Any]`): what all that was made of.
    """

    rows: DetectionRows
    reading: Reading
    tracks: dict[str, StoredTracks]
    identity: dict[str, Any]


def track_hypotheses(config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Reads the texts of each detection data set with all autoencoders, and tracks what is found through the layers.

    Args:
        config ([`GhostTrackConfig`]): `detection.dataset`, `tracking`, `evaluation.ablations`, and the folders.
        layers (*optional*): some of the model's; by default `extraction.layers`. Others have a folder of their own.
        force (`bool`, defaults to `False`): make again what is there.

    Returns:
        [`PhaseSummary`]: by data set.

    Raises:
        ValueError: an autoencoder is missing, a data set has labels of one kind or no answers, or what is there was
            made with other settings.
    """
    hookpoints = hookpoints_of(config, layers)
    data = {name: load_rows_of(config, name) for name in config.datasets}
    folders = {name: results_folder(config.tracking_folder, name, config, hookpoints) for name in data}
    if force:
        remove(*(folders[name] for name in data))
    identities = {name: _identity(config, hookpoints, rows) for name, rows in data.items()}
    skipped = [name for name in data if is_finished(folders[name], identities[name])]
    todo = [name for name in data if name not in skipped]
    facts: dict[str, Any] = {"tracks": str(config.tracking_folder)}
    for name in todo:
        begin(folders[name], identities[name])
    if todo:
        model, tokenizer = load_language_model(config)
        saes = {name: sae.to(model.device) for name, sae in load_saes(config, hookpoints).items()}
    for name in todo:
        from hf_gradtools.ghosttrack.reading.reading import read_texts

        reading = read_texts(
            model,
            tokenizer,
            saes,
            data[name].texts,
            data[name].answer_starts,
            top_k=config.tracking.top_k,
            batch_size=config.detection.batch_size,
            max_length=config.detection.max_tokens,
            scope=config.detection.scope,
            skip_first=config.detection.skip_first,
            hidden=True,
            output_dir=folders[name] / READING,
        )
        _track(config, saes, reading, folders[name])
        finish(folders[name], identities[name], {"texts": len(reading)})
        facts[name] = f"{len(reading)} texts, {len(hookpoints)} layers, {', '.join(associations(config))}"
    return PhaseSummary("track", todo, skipped, facts)


def associations(config: GhostTrackConfig) -> list[str]:
    """The configuration's, and the nulls that it is compared with."""
    nulls = NULLS if config.evaluation.ablations else ()
    return list(dict.fromkeys([config.tracking.association, *nulls]))


def load_rows_of(config: GhostTrackConfig, name: str) -> DetectionRows:
    """One of the configuration's data sets."""
    from hf_gradtools.ghosttrack.answers.detection_rows import DetectionRows

    return DetectionRows.load(name, config.datasets[name], config.detection.split)


def load_saes(config: GhostTrackConfig, hookpoints: Sequence[str]) -> dict[str, SAE]:
    """The autoencoders of phase 2.

    Raises:
        ValueError: one is missing or of another width.
    """
    from hf_gradtools.sae.saving import load_many

    for name in hookpoints:
        _weights_file(config, name)
    saes = load_many(config.checkpoints_folder(), hookpoints)
    for name, sae in saes.items():
        if sae.config.d_in != config.model.d_model:
            raise ValueError(
                f"the autoencoder in {config.checkpoints_folder() / name} has d_in={sae.config.d_in}, the model "
                f"d_model={config.model.d_model}. Train it again, or write another paths.models_dir."
            )
    return saes


def load_tracked(config: GhostTrackConfig, hookpoints: Sequence[str], name: str) -> TrackedData:
    """What phase 3 left of a data set.

    Raises:
        ValueError: it is not finished, damaged, or was made with other settings.
    """
    from hf_gradtools.ghosttrack.reading.reading import Reading
    from hf_gradtools.ghosttrack.tracking.track_files import load_tracks

    rows, folder = load_rows_of(config, name), results_folder(config.tracking_folder, name, config, hookpoints)
    identity = _identity(config, hookpoints, rows)
    if not is_finished(folder, identity):
        raise ValueError(f"{folder} holds no finished tracks. Run `hf-gradtools ghosttrack track` first.")
    reading = Reading.load(folder / READING)
    tracks = {kind: load_tracks(_tracks_file(folder, kind), reading.hypotheses) for kind in associations(config)}
    return TrackedData(rows, reading, tracks, identity)


def _track(config: GhostTrackConfig, saes: Mapping[str, SAE], reading: Reading, folder: Path) -> None:
    """Writes the tracks by each association that are not there yet."""
    from hf_gradtools.ghosttrack.tracking.track_files import save_tracks
    from hf_gradtools.ghosttrack.tracking.tracking import track

    missing = [kind for kind in associations(config) if not _tracks_file(folder, kind).exists()]
    if not missing:
        return
    decoders = [sae.W_dec.detach().float().cpu().numpy() for sae in saes.values()]
    options = _similarity_options(config, saes, reading)
    for kind in missing:
        chosen = replace(config.tracking, association=kind)
        save_tracks(track(reading.hypotheses, decoders, chosen, **options), _tracks_file(folder, kind))
        logger.info("tracked %d texts by %s association", len(reading), kind)


def _similarity_options(config: GhostTrackConfig, saes: Mapping[str, SAE], reading: Reading) -> dict[str, Any]:
    """What the similarity asked for needs beside the decoders, for each pair of neighbouring layers."""
    if config.tracking.similarity == "transported":
        return {"maps": transport_maps(reading)}
    if config.tracking.similarity == "coactivation":
        names = list(saes)
        return {"coactivation": _coactivation(config, saes, list(zip(names[:-1], names[1:], strict=True)))}
    return {}


def transport_maps(reading: Reading) -> list[np.ndarray]:
    """Procrustes maps between neighbouring layers, from the mean hidden states of the texts.

    No label is looked at, but all texts are: a cross-validation on transported tracks is transductive in that.
    """
    from hf_gradtools.ghosttrack.tracking.similarity import procrustes

    states, names = reading.hidden["mean"], reading.hookpoints
    return [procrustes(states[left], states[right]) for left, right in zip(names[:-1], names[1:], strict=True)]


def _coactivation(config: GhostTrackConfig, saes: Mapping[str, SAE], pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Counted over the first hidden states on disk."""
    import torch

    from hf_gradtools.ghosttrack.tracking.coactivation import CoactivationCounts
    from hf_gradtools.sae.store import ActivationStore

    source = ActivationStore.open(config.hidden_states_folder()).source(list(saes))
    counts = [CoactivationCounts(saes[left].config.d_sae, saes[right].config.d_sae) for left, right in pairs]
    for chunk in source.chunks(0, min(COUNTED_TOKENS, source.num_tokens)):
        with torch.no_grad():
            latents = {name: sae.encode_sparse(chunk[name].to(sae.W_enc)).nonzero() for name, sae in saes.items()}
        fired = {name: (found.indices.cpu().numpy(), found.offsets.cpu().numpy()) for name, found in latents.items()}
        for count, (left, right) in zip(counts, pairs, strict=True):
            count.add(fired[left], fired[right])
    return [count.statistic() for count in counts]


def _identity(config: GhostTrackConfig, hookpoints: Sequence[str], rows: DetectionRows) -> dict[str, Any]:
    tracking = {name: value for name, value in asdict(config.tracking).items() if name != "batch_texts"}
    weights = {name: hashlib.sha256(_weights_file(config, name).read_bytes()).hexdigest() for name in hookpoints}
    return {
        "model": config.model.base_model,
        "rows": rows.digest(),
        "autoencoders": weights,
        "tracking": tracking,
        "associations": associations(config),
        "scope": config.detection.scope,
        "max_tokens": config.detection.max_tokens,
        "skip_first": config.detection.skip_first,
    }


def _weights_file(config: GhostTrackConfig, hookpoint: str) -> Path:
    file = config.checkpoints_folder(_number(hookpoint)) / "sae_weights.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Run `hf-gradtools ghosttrack train` for this layer first.")
    return file


def _number(hookpoint: str) -> int:
    return int(hookpoint.rpartition(".")[2])


def _tracks_file(folder: Path, association: str) -> Path:
    return folder / f"tracks-{association}.safetensors"
