"""GRIT adapters as plain LoRA adapters, for an environment without this package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file

from hf_gradtools.grit.config import GritConfig


if TYPE_CHECKING:
    from hf_gradtools.grit.model import GritModel


def export_lora(
    adapter: PeftModel | GritModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    adapter_name: str = "default",
) -> None:
    """Writes the same tensors as a LoRA adapter: `rank_pattern` and `alpha_pattern` hold ranks and scales.

    Args:
        adapter: a model with a GRIT adapter; or a saved one, Hub id or folder (its base model is not loaded).
        path: folder to make.
        adapter_name: which adapter of a model.

    Raises:
        ValueError: the adapter is not one of GRIT, or `path` exists and is not empty.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"path={str(path)!r} exists already. Pass a folder that does not, or is empty.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        if isinstance(adapter, (str, os.PathLike)):
            config = _convert_saved(str(adapter), staging)
        else:
            config = _convert_model(adapter, adapter_name, staging)
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        staging.chmod(0o755)  # mkdtemp's folders are the owner's alone
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _convert_model(model: Any, adapter_name: str, folder: Path) -> dict[str, Any]:
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is none of {', '.join(model.peft_config)}.")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    prefix = "" if isinstance(model, PeftModel) else "base_model."  # of the tuner itself
    state = {prefix + key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    return lora_config(model.peft_config[adapter_name])


def _convert_saved(source: str, folder: Path) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    config = PeftConfig.from_pretrained(source)
    weights = Path(source) / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        weights = Path(hf_hub_download(source, SAFETENSORS_WEIGHTS_NAME))
    converted = lora_config(config)
    shutil.copyfile(weights, folder / SAFETENSORS_WEIGHTS_NAME)
    return converted


def lora_config(config: PeftConfig) -> dict[str, Any]:
    """The part of a GRIT config that plain LoRA knows, as it is written to `adapter_config.json`."""
    if not isinstance(config, GritConfig):
        raise ValueError(f"this is an adapter of type {config.peft_type}, not GRIT; PEFT loads it as it is.")
    values = {name: value for name, value in config.to_dict().items() if name in LoraConfig.__dataclass_fields__}
    values |= {"peft_type": "LORA", "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
