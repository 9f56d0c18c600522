"""The model that a run starts from."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.data.tokenizers import load_tokenizer
from hf_gradtools.nanogpt.modeling_nanogpt import NanoGPTForCausalLM
from hf_gradtools.workflow.terminal import no_bars


__all__ = ["RESUME", "SCRATCH", "build_model", "check_names", "config_fields"]

logger = logging.get_logger(__name__)

SCRATCH, RESUME, GPT2 = "scratch", "resume", "gpt2"
# Follow from other fields, or belong to generation.
NO_FLAG = {"layer_types", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


def config_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields of `NanoGPTConfig` that describe a model, by name."""
    own = set(NanoGPTConfig.__dict__["__annotations__"]) - NO_FLAG
    return {field.name: field for field in dataclasses.fields(NanoGPTConfig) if field.name in own}


def check_names(names: Mapping[str, Any] | set[str], known: set[str]) -> None:
    """ValueError naming what is not known, and what it may have been meant to be."""
    if unknown := sorted(set(names) - known):
        close = difflib.get_close_matches(unknown[0], known, 3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "See --help for all of them."
        raise ValueError(f"unknown options: {', '.join(unknown)}. {hint}")


def build_model(
    init_from: str, given: NanoGPTConfig | Mapping[str, Any] | None, data: TokenFolder, *, resumed: bool = False
) -> PreTrainedModel:
    """A new model, or one to go on from.

    Args:
        init_from (`str`): "scratch", "gpt2…", a folder, a Hub id, or a nanoGPT `ckpt.pt`.
        given (`NanoGPTConfig` or mapping, *optional*): its configuration; of a mapping, `vocab_size` defaults to that
            of the data. A model that is not made anew takes a smaller `block_size` and another `dropout`; what else it
            is given, of a `NanoGPTConfig` all of it, must be what it has.
        data (`TokenFolder`): what it is trained on.
        resumed (`bool`, defaults to `False`): the model goes on in its own run, and keeps its dropout.

    Raises:
        ValueError: the model cannot be loaded, does not fit the data, or is not what was asked for.
    """
    asked = _described(given) if isinstance(given, NanoGPTConfig) and init_from != SCRATCH else given
    if init_from == SCRATCH:
        model = NanoGPTForCausalLM(_config(asked, data))
    elif init_from.startswith(GPT2) and not Path(init_from).exists():
        model = NanoGPTForCausalLM.from_gpt2(init_from)
    elif Path(init_from).suffix == ".pt":
        model = NanoGPTForCausalLM.from_nanogpt(init_from)
    else:
        model = _load(init_from)
    if model.config.vocab_size < data.vocab_size:
        raise ValueError(
            f"the model has vocab_size={model.config.vocab_size}, and the data in {data.path} has ids up to "
            f"{data.vocab_size - 1}. Prepare the data by the model's own tokenizer, or train from scratch."
        )
    if init_from != SCRATCH:
        _compare_tokenizers(init_from, data)
    if init_from != SCRATCH and asked:
        model = _adjusted(model, dict(asked), init_from, resumed)
    return model


def _config(given: NanoGPTConfig | Mapping[str, Any] | None, data: TokenFolder) -> NanoGPTConfig:
    if isinstance(given, NanoGPTConfig):
        return given
    check_names(given or {}, {*config_fields(), *NanoGPTConfig.attribute_map})
    return NanoGPTConfig(**{"vocab_size": data.vocab_size, **(given or {})})


def _described(config: NanoGPTConfig) -> dict[str, Any]:
    """What a configuration says of a model, but the vocabulary, which may be larger than the data's."""
    return {name: getattr(config, name) for name in config_fields() if name != "vocab_size"}


def _compare_tokenizers(init_from: str, data: TokenFolder) -> None:
    """Warns if the ids of the data mean other tokens to the model, as far as both have a tokenizer."""
    folder = Path(init_from)
    if not data.has_tokenizer or (folder.exists() and not (folder / "tokenizer_config.json").is_file()):
        return
    try:
        known = load_tokenizer(init_from).get_vocab()
    except ValueError:  # of the Hub, without a tokenizer
        return
    ours = data.tokenizer.get_vocab()
    if others := [token for token, i in ours.items() if known.get(token) != i]:
        logger.warning(
            f"{len(others):,} of {len(ours):,} tokens of the data in {data.path}, such as {others[0]!r}, have other "
            f"ids in the tokenizer of init_from={init_from!r}, so that its embeddings mean other tokens. To train on "
            f"what it has learnt, prepare the data with tokenizer={init_from!r}."
        )


def _load(name: str) -> PreTrainedModel:
    try:
        with no_bars():
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"init_from={name!r} cannot be loaded: {reason}. Pass 'scratch', 'resume', 'gpt2', a folder or Hub id of "
            "a causal LM, or a nanoGPT ckpt.pt."
        ) from error


def _adjusted(model: PreTrainedModel, asked: dict[str, Any], init_from: str, resumed: bool) -> PreTrainedModel:
    """The model with the dropout asked for; ValueError if something is asked for that it is not."""
    config: PreTrainedConfig = model.config
    asked = {config.attribute_map.get(name, name): value for name, value in asked.items()}
    for name, value in asked.items():
        has = getattr(config, name, None)
        if (name == "dropout" and not resumed) or (name == "block_size" and (has is None or value <= has)):
            continue
        if has != value:
            raise ValueError(
                f"{name}={value!r}, but the model of init_from={init_from!r} has {has!r}. Leave {name} out, or train "
                "from scratch."
            )
    if "dropout" in asked and asked["dropout"] != getattr(config, "dropout", None):
        if not isinstance(model, NanoGPTForCausalLM):
            raise ValueError(f"dropout={asked['dropout']} is no option of a {type(model).__name__}. Leave it out.")
        changed = NanoGPTConfig.from_dict({**config.to_dict(), "dropout": asked["dropout"]})
        remade = NanoGPTForCausalLM(changed)
        remade.load_state_dict(model.state_dict())
        return remade
    return model
