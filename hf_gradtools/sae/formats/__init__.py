"""SAEs on disk: ours, which is SAELens' format with a block more, and what else is read.

The conversions are pure functions of dicts; only [`read_folder`] touches files.
[`~hf_gradtools.sae.pairs.write_pair`] writes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hf_gradtools.sae.formats.saelens import from_saelens, to_saelens
from hf_gradtools.sae.formats.sparsify import from_sparsify


__all__ = ["from_saelens", "from_sparsify", "read_folder", "to_saelens"]

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSIFY_WEIGHTS_FILE = "sae.safetensors"
SCALER_FILE = "activation_scaler.json"  # beside a checkpoint of SAELens' trainer


def read_folder(
    folder: str | os.PathLike[str], *, hookpoint: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads one SAE in our, SAELens' or sparsify's format, told apart by the name of the weights file.

    Args:
        folder (`str` or `PathLike`): holds `cfg.json` and `sae_weights.safetensors` or `sae.safetensors`.
        hookpoint (`str`, *optional*): where the SAE belongs, for files that do not say; by default the name of a
            sparsify folder.

    Returns:
        fields of an `SAEConfig`, and the tensors of our SAE.

    Raises:
        FileNotFoundError: if the folder holds no SAE.
        ValueError: if a file is damaged, or our SAE cannot represent the one in the folder exactly.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    weights = next((name for name in (WEIGHTS_FILE, SPARSIFY_WEIGHTS_FILE) if name in names), None)
    if weights is None or CONFIG_FILE not in names:
        raise FileNotFoundError(
            f"{folder} holds no SAE; need {CONFIG_FILE} and {WEIGHTS_FILE} (ours, SAELens') or "
            f"{SPARSIFY_WEIGHTS_FILE} (sparsify's), found {', '.join(names[:8]) or 'nothing'}. "
            "Pass the folder of one hookpoint."
        )
    cfg, tensors = _read_json(folder / CONFIG_FILE), _read_tensors(folder / weights)
    if weights == SPARSIFY_WEIGHTS_FILE:
        return from_sparsify(cfg, tensors, hookpoint=hookpoint or folder.resolve().name)
    scaled = cfg.get("normalize_activations") not in (None, False, "none")
    factor = _read_json(folder / SCALER_FILE).get("scaling_factor") if scaled and SCALER_FILE in names else None
    fields, state = from_saelens(cfg, tensors, scaling_factor=factor)
    if hookpoint is not None and fields.get("hookpoint") is None:
        fields["hookpoint"] = hookpoint
    return fields, state


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}; need a JSON object.")
    return value


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}). Copy or download it again.") from error
