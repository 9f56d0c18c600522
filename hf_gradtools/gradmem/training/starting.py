"""The model and the tokenizer that a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_gradtools.gradmem.configuration_gradmem import GradMemConfig
from hf_gradtools.gradmem.kv_retrieval import build_kv_tokenizer
from hf_gradtools.gradmem.training.options import TrainOptions
from hf_gradtools.gradmem.wrapping import get_gradmem_model
from hf_gradtools.workflow.causal_lm import load_tokenizer
from hf_gradtools.workflow.terminal import no_bars


__all__ = ["build_model", "build_tokenizer", "load_trained", "loading_options"]

logger = logging.get_logger(__name__)


def build_tokenizer(options: TrainOptions, alphabet: int) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, else the pretrained model's, else that of the task.

    Args:
        options ([`TrainOptions`]): the run.
        alphabet (`int`): symbols of the task's alphabet.
    """
    name = options.tokenizer_path or options.pretrained_model
    return build_kv_tokenizer(alphabet) if name is None else load_tokenizer(name)


def build_model(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, or one to start with.

    Args:
        options ([`TrainOptions`]): the run.
        tokenizer (`PreTrainedTokenizerBase`): whose vocabulary a new backbone has.
        checkpoint (`Path`, *optional*): what the run goes on from.

    Raises:
        ValueError: it cannot be loaded, or its parts do not go together.
    """
    loading = loading_options(options)
    if checkpoint is not None:
        return load_trained(checkpoint, **loading)
    if options.pretrained_model is not None:
        model = load_trained(options.pretrained_model, **loading)
        model = model if options.vanilla else get_gradmem_model(model, GradMemConfig(**options.memory))
    else:
        config = _new_config(options, tokenizer)
        config = config if options.vanilla else GradMemConfig(base_config=config, **options.memory)
        model = AutoModelForCausalLM.from_config(config, **loading)
    if options.init_checkpoint is not None:
        _take_weights(model, Path(options.init_checkpoint))
    return model


def loading_options(options: TrainOptions) -> dict[str, Any]:
    """How weights are loaded or made: a run trains in float32."""
    chosen = options.attn_implementation  # None, if it is passed, is no choice to transformers, but no attention mask
    return {"dtype": torch.float32, **({"attn_implementation": chosen} if chosen else {})}


def load_trained(folder: Path | str, **loading: Any) -> PreTrainedModel:
    """A model that a run left in a folder; ValueError if there is none."""
    try:
        with no_bars():
            return AutoModelForCausalLM.from_pretrained(folder, **loading)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{str(folder)!r} cannot be loaded: {reason}. Pass the folder of a trained model.") from error


def _new_config(options: TrainOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    shared = {"vocab_size": len(tokenizer), **special}
    if options.base_model == "gpt2":
        return GPT2Config(
            n_layer=options.n_layer,
            n_head=options.n_head,
            n_embd=options.n_embd,
            n_positions=options.max_position_embeddings,
            **shared,
        )
    return LlamaConfig(
        num_hidden_layers=options.n_layer,
        num_attention_heads=options.n_head,
        num_key_value_heads=options.n_head,
        hidden_size=options.n_embd,
        intermediate_size=4 * options.n_embd,
        max_position_embeddings=options.max_position_embeddings,
        tie_word_embeddings=True,
        **shared,
    )


def _take_weights(model: PreTrainedModel, folder: Path) -> None:
    """Starts with the weights of an earlier run; parts that it did not have stay as they are, and are told."""
    file = folder / "model.safetensors" if folder.is_dir() else folder
    if not file.is_file():
        raise ValueError(f"init_checkpoint={str(folder)!r} holds no model.safetensors. Pass the folder of a run.")
    try:
        missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"init_checkpoint={str(folder)!r} is of a model of another shape: {reason}") from error
    if unexpected:
        raise ValueError(
            f"init_checkpoint={str(folder)!r} has {', '.join(unexpected[:3])}, which this model has not. Pass "
            "the same options of backbone and memory."
        )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if new := sorted(set(missing) - tied):
        logger.warning(f"init_checkpoint={str(folder)!r} has no {', '.join(new)}; these start anew")
