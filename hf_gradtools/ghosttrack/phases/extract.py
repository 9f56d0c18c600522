"""Phase 1: the hidden states of the chosen layers, from one pass of the model, to `<cache_dir>/hidden_states`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.ghosttrack.phases.common import Layers, PhaseSummary, hookpoints_of, load_language_model, remove
from hf_gradtools.sae.training_config import differing


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


__all__ = ["extract_hidden_states"]

logger = logging.getLogger(__name__)


def extract_hidden_states(config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Writes the hidden states that the autoencoders learn from, or goes on where a killed run was.

    Args:
        config ([`GhostTrackConfig`]): `model`, `extraction`, `sae_training.n_tokens`, `paths.cache_dir`.
        layers (*optional*): some of the model's; by default `extraction.layers`.
        force (`bool`, defaults to `False`): extract again what is there.

    Returns:
        [`PhaseSummary`]: by hookpoint.

    Raises:
        ValueError: the model is another than the configuration says, there is no text, or the folder holds hidden
            states that were made with other settings.
    """
    from hf_gradtools.sae.extraction import extract
    from hf_gradtools.sae.packing import token_blocks
    from hf_gradtools.workflow.data import load_rows

    hookpoints, folder, wanted = hookpoints_of(config, layers), config.hidden_states_folder(), _settings(config)
    if force:
        _forget(folder, hookpoints)
    finished = _finished(folder, hookpoints, wanted)
    missing = [name for name in hookpoints if name not in finished]
    facts: dict[str, Any] = {"hidden states": str(folder)}
    if not missing:
        return PhaseSummary("extract", [], finished, facts)
    if config.extraction.dataset is None:
        raise ValueError(
            "extraction.dataset=None names no texts to extract hidden states of. Write a Hub id or a file, such as "
            "extraction.dataset=texts.jsonl."
        )
    model, tokenizer = load_language_model(config)
    sequences = token_blocks(
        load_rows(config.extraction.dataset, config.extraction.split),
        tokenizer,
        config.extraction.max_length,
        text_column=config.extraction.text_column,
        seed=config.sae_training.seed,
        max_tokens=config.sae_training.n_tokens,
    )
    if sequences.numel() + config.extraction.max_length <= config.sae_training.n_tokens:
        logger.warning(
            "extraction.dataset=%r has %d tokens, fewer than sae_training.n_tokens=%d",
            config.extraction.dataset,
            sequences.numel(),
            config.sae_training.n_tokens,
        )
    batch_size = _fitting_batch_size(model, sequences, missing, config)
    store = extract(
        model,
        sequences,
        missing,
        folder,
        batch_size=batch_size,
        dtype=config.extraction.dtype,
        skip_positions=config.extraction.skip_positions,
        model_name=config.model.base_model,
        tokenizer_name=config.model.base_model,
        corpus=wanted["corpus"],
    )
    facts |= {"tokens of each layer": store.num_tokens_of(missing[0]), "sequences at once": batch_size}
    return PhaseSummary("extract", missing, finished, facts)


def _settings(config: GhostTrackConfig) -> dict[str, Any]:
    """Of a store's identity what follows from the configuration alone."""
    section = config.extraction
    corpus = {
        "dataset": section.dataset,
        "split": section.split,
        "text_column": section.text_column,
        "max_tokens": config.sae_training.n_tokens,
        "seed": config.sae_training.seed,
        "revision": config.model.revision,
    }
    return {
        "model": config.model.base_model,
        "corpus": corpus,
        "context_length": section.max_length,
        "skip_positions": section.skip_positions,
        "dtype": section.dtype,
    }


def _finished(folder: Path, hookpoints: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
    """The hookpoints whose rows are all there.

    Raises:
        ValueError: they were made with other settings.
    """
    from hf_gradtools.sae.store import ActivationStore

    if not any(folder.glob("*/manifest.json")):
        return []
    store = ActivationStore.open(folder)
    present = [name for name in hookpoints if name in store.identities]
    for name in present:
        identity = {key: store.identities[name].get(key) for key in wanted}
        if changed := differing(identity, dict(wanted)):
            raise ValueError(
                f"{folder / name} holds hidden states that were made with other settings ({'; '.join(changed)}). "
                "Pass force=True (--force) to extract anew, or another paths.cache_dir."
            )
    return [name for name in present if store.is_complete(name)]


def _forget(folder: Path, hookpoints: Sequence[str]) -> None:
    remove(*(folder / name for name in hookpoints))
    if not any(folder.glob("*/manifest.json")):
        (folder / "tokens.safetensors").unlink(missing_ok=True)


def _fitting_batch_size(
    model: PreTrainedModel, sequences: Tensor, hookpoints: Sequence[str], config: GhostTrackConfig
) -> int:
    """The sequences that fit at once: those asked for, halved until one forward of them goes through.

    All sequences are of one length, so what one forward needs, all need.
    """
    from hf_gradtools.sae.streaming import ModelActivations

    source = ModelActivations(model, sequences, hookpoints, config.extraction.batch_size)
    next(source.chunks())
    return source.forward_size
