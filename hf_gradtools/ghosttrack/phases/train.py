"""Phase 2: an autoencoder for each chosen layer, all of them from one pass over the hidden states on disk.

On one device that pass is what layers share: where memory runs out, fewer of them learn at a time, which changes no
result; only a single layer that still does not fit gets smaller batches. Several devices share out the layers under
`torchrun`, or as processes with `--layers` of their own.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core import checksums
from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.ghosttrack.phases.common import Layers, PhaseSummary, hookpoints_of, remove


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
    from hf_gradtools.sae.modeling_sae import SAE
    from hf_gradtools.sae.store import ActivationStore
    from hf_gradtools.sae.trainer import SAETrainer


__all__ = ["train_saes"]

logger = logging.getLogger(__name__)

CHECKPOINTS, FITTED, FINISHED = "checkpoints", "batch_size.json", "finished.json"


def train_saes(config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Trains the autoencoders of the chosen layers, or goes on where a killed run was.

    Each is the same whether it learns alone or with others.

    Args:
        config ([`GhostTrackConfig`]): `sae`, `sae_training`, and `paths.cache_dir`, `paths.models_dir`.
        layers (*optional*): some of the model's; by default `extraction.layers`.
        force (`bool`, defaults to `False`): train again those that are there.

    Returns:
        [`PhaseSummary`]: by hookpoint, with what the held-out sequences say.

    Raises:
        ValueError: hidden states are missing, unfinished, damaged or of another width, or a finished autoencoder was
            trained with other settings.
    """
    hookpoints, output = hookpoints_of(config, layers), config.checkpoints_folder()
    if force:
        remove(*(output / name for name in hookpoints), *(output / CHECKPOINTS / name for name in hookpoints))
    store = _open(config, hookpoints)
    finished = [name for name in hookpoints if (output / CHECKPOINTS / name / FINISHED).exists()]
    todo = [name for name in hookpoints if name not in finished]
    for name in todo:
        checksums.verify(store.path / name)
    saes: dict[str, SAE] = {}
    for batch_size, names in _by_batch_size(config, hookpoints).items():
        saes |= _train(config, store, names, batch_size)
    facts: dict[str, Any] = {"autoencoders": str(output)}
    for name in hookpoints:
        figures = saes[name].config.metadata.get("evaluation", {}) if name in saes else {}
        facts |= {name: f"FVU {figures['fvu']:.4f}, L0 {figures['l0']:.1f}"} if figures.get("fvu") is not None else {}
    return PhaseSummary("train", todo, finished, facts)


def _open(config: GhostTrackConfig, hookpoints: Sequence[str]) -> ActivationStore:
    from hf_gradtools.sae.store import ActivationStore

    folder = config.hidden_states_folder()
    store = ActivationStore.open(folder) if any(folder.glob("*/manifest.json")) else None
    for name in hookpoints:
        if store is None or name not in store.identities or not store.is_complete(name):
            raise ValueError(
                f"{folder / name} has no hidden states, or not all of them. Run `hf-gradtools ghosttrack extract` for "
                "this layer first; it goes on where it was."
            )
        if store.d_in(name) != config.sae.d_model:
            raise ValueError(
                f"sae.d_model={config.sae.d_model} does not fit {folder / name}, where hidden states have width "
                f"{store.d_in(name)}. Write d_model: {store.d_in(name)} below model and sae."
            )
    assert store is not None
    return store


def _train(config: GhostTrackConfig, store: ActivationStore, names: Sequence[str], batch_size: int) -> dict[str, SAE]:
    """All of them in one pass; in several, then with smaller batches, where memory does not suffice."""
    from hf_gradtools.core.inference import free_cached_memory, is_out_of_memory

    trained: dict[str, SAE] = {}
    pending, at_once = list(names), len(names)
    while pending:
        chosen = pending[:at_once]
        try:
            trained |= _trainer(config, store, chosen, batch_size).train(resume=True)
            pending = pending[at_once:]
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error) or (len(chosen) == 1 and batch_size == 1):
                raise
        free_cached_memory()
        if len(chosen) > 1:
            at_once = len(chosen) // 2
            logger.warning("out of memory with %d layers at once; going on with %d", len(chosen), at_once)
        else:
            batch_size //= 2
            _keep_batch_size(config, pending, batch_size)
            logger.warning(
                "out of memory with one layer in batches of %d tokens; beginning %s again with %d. "
                "Set sae_training.batch_size to that.",
                batch_size * 2,
                ", ".join(pending),
                batch_size,
            )
    return trained


def _trainer(config: GhostTrackConfig, store: ActivationStore, names: Sequence[str], batch_size: int) -> SAETrainer:
    from hf_gradtools.sae.held_out import PartOfSource
    from hf_gradtools.sae.trainer import SAETrainer

    source, per = store.source(list(names)), store.tokens_per_sequence
    sequences = source.num_tokens // per
    held_out = max(1, round(config.sae_training.holdout * sequences)) if sequences > 1 else 0
    split = (sequences - held_out) * per
    return SAETrainer(
        config.sae.to_config(config.model.base_model),
        PartOfSource(source, 0, split),
        config.sae_training.to_config(str(config.checkpoints_folder()), batch_size),
        PartOfSource(source, split, source.num_tokens) if held_out else None,
    )


# Batches that fitted, kept beside the checkpoints


def _by_batch_size(config: GhostTrackConfig, hookpoints: Sequence[str]) -> dict[int, list[str]]:
    """Hookpoints by the batch that they are trained with: the one asked for, unless a smaller one had to do."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in hookpoints:
        file = _fitted_file(config, name)
        kept = json.loads(file.read_bytes()) if file.exists() else {}
        asked = config.sae_training.batch_size
        found[kept["fitted"] if kept.get("asked") == asked else asked].append(name)
    return found


def _keep_batch_size(config: GhostTrackConfig, hookpoints: Sequence[str], batch_size: int) -> None:
    for name in hookpoints:
        file = _fitted_file(config, name)
        for checkpoint in file.parent.glob("step-*.safetensors"):  # of larger batches, so of no use
            checkpoint.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(file, {"asked": config.sae_training.batch_size, "fitted": batch_size})


def _fitted_file(config: GhostTrackConfig, hookpoint: str) -> Path:
    return config.checkpoints_folder() / CHECKPOINTS / hookpoint / FITTED
