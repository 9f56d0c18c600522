"""A trained model and its tokenizer, from a folder or the Hub, of this library, of transformers, or of nanoGPT."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.nanogpt.data.token_folder import META, META_PICKLE, READY, TokenFolder
from hf_gradtools.workflow.causal_lm import load_model


__all__ = ["default_device", "load_trained", "load_trained_model", "load_trained_tokenizer"]

CHECKPOINT = "ckpt.pt"
METAS = (META, META_PICKLE)


def load_trained(
    source: str, tokenizer: str | None = None, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, ready to evaluate, and its tokenizer.

    Args:
        source (`str`): folder or Hub id of a causal LM, or a folder with a nanoGPT `ckpt.pt`, or that file.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer, or name or folder of a prepared dataset;
            default `source`.
        device (`str`, *optional*): default the first accelerator, else the CPU.
        dtype (`str`, defaults to `"auto"`): of the weights.

    Raises:
        ValueError: either cannot be loaded.
    """
    if not Path(source).expanduser().exists() and (source == "out" or source.startswith(("/", "./", "../", "~"))):
        raise ValueError(f"there is no folder {source!r}. Pass out_dir= the folder of a trained model, or a Hub id.")
    loaded = load_trained_tokenizer(tokenizer or source)  # the quicker one to fail
    return load_trained_model(source, device, dtype), loaded


def load_trained_model(source: str, device: str | None = None, dtype: str = "auto") -> PreTrainedModel:
    """The model alone; see [`load_trained`]."""
    check_device(device)
    path = Path(source).expanduser()
    checkpoint = path if path.is_file() else path / CHECKPOINT
    if checkpoint.is_file() and not (path / "config.json").exists():
        from hf_gradtools.nanogpt import NanoGPTForCausalLM

        model: PreTrainedModel = NanoGPTForCausalLM.from_nanogpt(str(checkpoint))
        model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    else:
        model = load_model(str(path) if path.exists() else source, dtype)
    return model.to(device or default_device()).eval()


def load_trained_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone; see [`load_trained`]."""
    path = Path(source).expanduser()
    if source == READY or any((folder / meta).is_file() for folder in (path, Path("data") / source) for meta in METAS):
        return TokenFolder(source).tokenizer
    try:
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else source)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"tokenizer={source!r} cannot be loaded: {reason}. Pass tokenizer= a folder or Hub id that has one, "
            "such as the folder of the dataset that the model was trained on."
        ) from error


def check_device(device: str | None) -> None:
    """ValueError unless this machine has the device."""
    here = {"cpu", default_device()}
    if device is not None and device.split(":")[0] not in here:
        raise ValueError(f"device={device!r} is not on this machine. Pass one of {', '.join(sorted(here))}.")


def default_device() -> str:
    """The first accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type
