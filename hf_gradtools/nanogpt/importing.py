"""GPT-2 and nanoGPT checkpoints as our models, and ours as nanoGPT's.

nanoGPT keeps a linear map's weight as `[out, in]`, GPT-2's Conv1D as `[in, out]`; the names are otherwise the same.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.utils import logging

from .configuration_nanogpt import NanoGPTConfig


logger = logging.get_logger(__name__)

# What nanoGPT's own model is in our words.
NANOGPT = {
    "attention_variant": "causal",
    "mlp_variant": "mlp",
    "activation_variant": "gelu",
    "norm_variant_attn": "layernorm",
    "norm_variant_output": "layernorm",
    "norm_eps": 1e-5,
    "softmax_variant_attn": "softmax",
    "use_rotary_embeddings": False,
    "use_abs_pos_embeddings": True,
    "use_fire_embeddings": False,
    "use_pre_ln": True,
    "use_peri_ln": False,
    "use_post_ln": False,
    "use_parallel_mlp": False,
    "linear_variant_attn": "linear",
    "linear_variant_mlp": "linear",
    "mlp_expansion_factor": 4,
    "mlp_size": None,
    "tie_word_embeddings": True,
}
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
POSITIONS, OUR_POSITIONS = "transformer.wpe.weight", "transformer.positions.abs_pos.wpe.weight"
COMPILED = "_orig_mod."  # what torch.compile puts before each name


def from_gpt2(cls: type, model: Any, **kwargs: Any) -> Any:
    """A `GPT2LMHeadModel` as a nanoGPT with the same logits.

    Args:
        cls (`type`): `NanoGPTForCausalLM`.
        model (`GPT2LMHeadModel` or `str`): the model, its Hub id, or its folder.
        **kwargs: for `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: it is no GPT-2, or scales its attention in a way nanoGPT has not.
    """
    attention = kwargs.pop("attn_implementation", None)
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(
            f"model is a {type(model).__name__}; from_gpt2 takes a GPT2LMHeadModel, its Hub id or folder."
        )
    source = model.config
    for flag in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(source, flag):
            raise ValueError(f"the GPT-2 has {flag}=True, which nanoGPT models do not. Import one without.")
    if not source.scale_attn_weights:
        raise ValueError("the GPT-2 has scale_attn_weights=False, which nanoGPT models do not. Import one without.")
    if len({source.embd_pdrop, source.attn_pdrop, source.resid_pdrop}) > 1:
        logger.warning(
            f"the GPT-2 has embd_pdrop={source.embd_pdrop}, attn_pdrop={source.attn_pdrop} and "
            f"resid_pdrop={source.resid_pdrop}; nanoGPT models have one dropout, here that of resid_pdrop."
        )
    shape = {
        "activation_variant": source.activation_function,
        "norm_eps": source.layer_norm_epsilon,
        "mlp_size": source.n_inner,
        "tie_word_embeddings": source.tie_word_embeddings,
    }
    config = NanoGPTConfig(
        vocab_size=source.vocab_size,
        block_size=source.n_positions,
        n_layer=source.n_layer,
        n_head=source.n_head,
        n_embd=source.n_embd,
        bias=True,
        dropout=source.resid_pdrop,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        **{**NANOGPT, **shape},
    )
    weights = {}
    for name, value in model.state_dict().items():
        is_conv1d = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        weights[_our_name(name)] = value.t() if is_conv1d else value
    filled = _filled(cls, config, weights)
    if attention is not None:
        filled.set_attn_implementation(attention)
    return filled


def from_nanogpt(cls: type, path: str | os.PathLike[str]) -> Any:
    """The model of a nanoGPT `ckpt.pt`, with the same logits.

    The file is read as tensors and plain containers: code in it is not run.

    Args:
        cls (`type`): `NanoGPTForCausalLM`.
        path (`str` or `os.PathLike`): a checkpoint with "model" and "model_args".

    Raises:
        ValueError: the file holds something else than tensors and plain containers, or not those of nanoGPT's model.
    """
    checkpoint = load_checkpoint(path)
    args = checkpoint["model_args"]
    if missing := [name for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size") if name not in args]:
        raise ValueError(f"{path}: model_args has no {', '.join(missing)}. Is it a checkpoint of nanoGPT's train.py?")
    is_rotary = bool(args.get("use_rotary_embeddings", False))
    positions = {
        "use_rotary_embeddings": is_rotary,
        "use_abs_pos_embeddings": bool(args.get("use_abs_pos_embeddings", not is_rotary)),
    }
    known = {"bias": True, **{name: args[name] for name in MODEL_ARGS if args.get(name) is not None}}
    weights = {_our_name(name.removeprefix(COMPILED)): value for name, value in checkpoint["model"].items()}
    weights = {name: value for name, value in weights.items() if not name.endswith((".attn.bias", ".masked_bias"))}
    config = NanoGPTConfig(**{**NANOGPT, **positions, **known})
    if is_rotary:
        for name in [name for name in weights if ".attn.c_attn." in name]:
            weights[name] = half_rotation(weights[name], config.n_head, config.n_embd)
    try:
        return _filled(cls, config, weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights are not those of nanoGPT's model. {error}") from error


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A nanoGPT checkpoint as tensors and plain containers.

    Raises:
        ValueError: it holds anything else, which loading could run, or no "model" and "model_args".
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not read: it holds more than tensors and plain containers, and loading it could run code "
            f"({reason}). If you trust where it is from, save its 'model' and 'model_args' alone."
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError) as error:  # what torch makes of other files
        raise ValueError(f"{path} is no file of torch.save: {type(error).__name__} {error}") from error
    parts = [checkpoint.get(name) for name in ("model", "model_args")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(part, dict) and part for part in parts):
        raise ValueError(f"{path} holds no 'model' and 'model_args'. Is it a checkpoint of nanoGPT's train.py?")
    return checkpoint


def save_nanogpt(model: Any, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that nanoGPT's own model loads, with the same logits.

    Args:
        model (`NanoGPTForCausalLM`): a model of nanoGPT's own parts.
        path (`str` or `os.PathLike`): the file to make or replace.

    Raises:
        ValueError: the model has parts that nanoGPT has not; the message names them.
    """
    config = model.config
    if strangers := _not_of_nanogpt(config):
        raise ValueError(f"nanoGPT has no {', '.join(strangers)}. Only models of its own parts can be exported.")
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    weights[POSITIONS] = weights.pop(OUR_POSITIONS)
    args = {name: getattr(config, name) for name in MODEL_ARGS}
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        torch.save({"model": weights, "model_args": args}, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def half_rotation(weight: Tensor, n_head: int, n_embd: int) -> Tensor:
    """Rows of q and k of a fused projection, from pairs of neighbours (2d, 2d + 1) to pairs (d, d + D/2).

    Args:
        weight (`Tensor`): `[3 n_embd, ...]`, rows of q, k and v.
        n_head, n_embd (`int`): sizes.
    """
    q, k, v = weight.split(n_embd)
    turned = [x.unflatten(0, (n_head, -1, 2)).transpose(1, 2).reshape(x.shape) for x in (q, k)]
    return torch.cat((*turned, v))


def _not_of_nanogpt(config: NanoGPTConfig) -> list[str]:
    """Fields that nanoGPT's model has no word for, with their values."""
    none = dict.fromkeys(("window_size", "attn_logit_softcapping", "final_logit_softcapping"))
    off = dict.fromkeys(("use_flash_lobo", "use_qk_norm"), False)
    linear = dict.fromkeys(("linear_variant_attn_proj", "linear_variant_mlp_up", "linear_variant_mlp_down"), "linear")
    allowed: dict[str, Any] = {**NANOGPT, **none, **off, **linear}
    either = {
        "activation_variant": ("gelu", None),
        "n_kv_group": (None, config.n_head),
        "mlp_size": (4 * config.n_embd,) if config.mlp_expansion_factor != 4 else (None, 4 * config.n_embd),
    }
    del allowed["mlp_expansion_factor"]
    return [
        f"{name}={getattr(config, name)!r}"
        for name in {**allowed, **either}
        if any(config.of_layer(name, i) not in either.get(name, (allowed.get(name),)) for i in range(config.n_layer))
    ]


def _our_name(name: str) -> str:
    return OUR_POSITIONS if name == POSITIONS else name


def _filled(cls: type, config: NanoGPTConfig, weights: dict[str, Tensor]) -> Any:
    """A model of copies of the weights: made without any, so that none are drawn in vain."""
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict({name: value.detach().clone().contiguous() for name, value in weights.items()}, assign=True)
    model.tie_weights()
    return model.eval()
