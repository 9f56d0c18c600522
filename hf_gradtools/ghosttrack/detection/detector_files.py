"""A detector on disk and on the Hub: JSON and safetensors, each file by its name and no other.

    config.json                        what it is
    classifier.json, .safetensors      what decides
    saes/<hookpoint>/                  the autoencoders, unless they have a repository of their own
    tracking_maps.safetensors          maps between layers, where tracking is "transported"
    tokenizer.json, ...                the model's tokenizer

Nothing that could run code is opened, or even downloaded.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.classifiers.classifier_files import (
    CLASSIFIER_ARRAYS,
    CLASSIFIER_JSON,
    CODE_ENDINGS,
    load_classifier,
)
from hf_gradtools.hub import is_hub_id


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.classifiers.frozen import FrozenClassifier
    from hf_gradtools.ghosttrack.detection.configuration_detector import DetectorConfig
    from hf_gradtools.sae.modeling_sae import SAE

__all__ = [
    "CONFIG",
    "MAPS",
    "SAES",
    "check_config",
    "find_folder",
    "load_causal_lm",
    "load_maps",
    "load_parts",
    "load_saes",
    "load_tokenizer",
    "save_maps",
]

CONFIG, MAPS, SAES = "config.json", "tracking_maps.safetensors", "saes"
DOWNLOADED = [
    *(CONFIG, CLASSIFIER_JSON, CLASSIFIER_ARRAYS, MAPS),
    *(f"{SAES}/*.json", f"{SAES}/*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
]
HOW = "Pass a folder that HallucinationDetector.save_pretrained wrote, or a Hub id."


def find_folder(name_or_path: str | os.PathLike[str], **download: Any) -> Path:
    """The folder of a detector, downloaded if it is on the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        **download: of `snapshot_download`, such as `revision`, `token` and `cache_dir`.

    Raises:
        ValueError: it is a file, or neither a folder nor a Hub id, or holds no detector.
    """
    path = Path(name_or_path)
    if path.is_file():
        why = "may run code when it is loaded, so it is not opened" if path.suffix in CODE_ENDINGS else "is a file"
        raise ValueError(f"{path} {why}. {HOW}")
    if not path.is_dir():
        if not is_hub_id(str(name_or_path)):
            raise ValueError(f"{str(name_or_path)!r} is neither a folder nor an id of the Hub. {HOW}")
        path = Path(snapshot_download(str(name_or_path), allow_patterns=DOWNLOADED, **download))
    if not (path / CONFIG).is_file():
        code = sorted(file.name for file in path.iterdir() if file.suffix in CODE_ENDINGS)
        instead = f"; {code[0]} may run code when it is loaded, so it is not opened" if code else ""
        raise ValueError(f"{name_or_path} has no {CONFIG} of a detector{instead}. {HOW}")
    return path


def check_config(folder: Path, model_type: str) -> None:
    """ValueError unless the folder's configuration is JSON and of that type."""
    try:
        values = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is no JSON ({type(error).__name__}). {HOW}") from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != model_type:
        raise ValueError(f"{folder / CONFIG} is of model_type={found!r}; a detector's is {model_type!r}. {HOW}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a detector.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of the Rust library, which has no class of its own for them
        raise ValueError(f"{folder} has no whole tokenizer ({error}). {HOW}") from error


def load_causal_lm(name_or_path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """The language model of a detector, in evaluation mode and in the type that it was saved in.

    Raises:
        ValueError: its weights are a pickle of something else than tensors.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **{"dtype": "auto", **options}).eval()
    except pickle.UnpicklingError as error:  # of torch, which unpickles nothing but tensors here
        raise ValueError(
            f"{name_or_path} offers weights that could run code when they are loaded, so they are not. Pass a "
            "causal_lm that was saved as safetensors."
        ) from error


def load_saes(folder: Path, config: DetectorConfig, **download: Any) -> dict[str, SAE]:
    """The autoencoders of the configuration's hookpoints, in that order.

    Raises:
        ValueError: one is missing, or its files are damaged or of another kind.
    """
    from hf_gradtools.sae.saving import load_many

    if config.sae_repo is None:
        if not (folder / SAES).is_dir():
            raise ValueError(f"{folder} has no autoencoders in {SAES!r}, and sae_repo is None. {HOW}")
        found = load_many(folder / SAES, config.hookpoints)
    else:
        found = load_many(config.sae_repo, config.hookpoints, revision=config.sae_revision, **download)
    missing = [hookpoint for hookpoint in config.hookpoints if hookpoint not in found]
    if missing:
        raise ValueError(f"no autoencoder of hookpoint={missing[0]!r}; found {', '.join(found)}. {HOW}")
    return {hookpoint: found[hookpoint] for hookpoint in config.hookpoints}


def load_parts(
    folder: Path, config: DetectorConfig, **access: Any
) -> tuple[dict[str, SAE], FrozenClassifier, list[np.ndarray] | None]:
    """Autoencoders, classifier and, where tracking needs them, maps between layers.

    Raises:
        ValueError: a part is missing, damaged or of another detector.
    """
    classifier = load_classifier(folder)
    saes = load_saes(folder, config, **{name: access[name] for name in ("token", "cache_dir") if name in access})
    expected = sum(sae.config.d_sae for sae in saes.values())
    if config.features == "latents" and classifier.n_features != expected:
        raise ValueError(
            f"{folder} has a classifier of {classifier.n_features} features and autoencoders of {expected}: they do "
            f"not belong together. {HOW}"
        )
    transported = config.tracking_config.similarity == "transported"
    return saes, classifier, load_maps(folder / MAPS, len(saes) - 1) if transported else None


def save_maps(maps: Sequence[np.ndarray], path: Path) -> None:
    """Writes the map of each pair of neighbouring hookpoints, whole or not at all."""
    arrays = {str(i): np.ascontiguousarray(array, dtype=np.float32) for i, array in enumerate(maps)}
    with atomic_write(path) as file:
        file.write(save(arrays))


def load_maps(path: Path, count: int) -> list[np.ndarray]:
    """Reads what [`save_maps`] wrote.

    Raises:
        ValueError: the file is missing or damaged, or holds other than `count` matrices.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing, and tracking with similarity='transported' needs it. {HOW}")
    try:
        arrays = load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}). {HOW}") from error
    if set(arrays) != {str(i) for i in range(count)} or any(array.ndim != 2 for array in arrays.values()):
        raise ValueError(f"{path} holds {sorted(arrays)}; need {count} matrices, one per pair of hookpoints. {HOW}")
    maps = [arrays[str(i)] for i in range(count)]
    if not all(np.isfinite(array).all() for array in maps):
        raise ValueError(f"{path} holds NaN or infinity. {HOW}")
    return maps
