"""The same small decoder from four hands, for the nanoGPT benchmarks: bare, ours, GPT-2 of transformers, litgpt."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from bare_nanogpt import BareConfig, BareNanoGPT
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel


HOW_TO_LITGPT = (
    "litgpt is not measured: it is not importable. Its pins clash with transformers 5 (huggingface_hub < 1.4), so put "
    "it in a folder of its own: `pip install --no-deps --target LITGPT litgpt lightning lightning-utilities "
    "torchmetrics pytorch-lightning jsonargparse docstring-parser typeshed-client`, and run with `PYTHONPATH=LITGPT`."
)


@dataclass(frozen=True)
class Shape:
    """Width, layers, tokens in a row, rows in a batch; 4 heads, a vocabulary of 65."""

    n_embd: int
    n_layer: int
    block_size: int
    batch_size: int
    n_head: int = 4
    vocab_size: int = 65

    def __str__(self) -> str:
        return f"E{self.n_embd} L{self.n_layer} T{self.block_size} B{self.batch_size} H{self.n_head}"

    def sizes(self) -> dict[str, int]:
        names = ("n_embd", "n_layer", "block_size", "n_head", "vocab_size")
        return {name: getattr(self, name) for name in names}


SHAPES = {"small": Shape(128, 4, 64, 12), "large": Shape(256, 4, 256, 12)}


def bare(shape: Shape, positions: str = "absolute") -> BareNanoGPT:
    torch.manual_seed(0)
    return BareNanoGPT(BareConfig(**shape.sizes(), rotary=positions == "rotary"))


def our_fields(shape: Shape, positions: str = "absolute") -> dict[str, Any]:
    """The fields of `NanoGPTConfig` that make it the bare model."""
    return {
        **shape.sizes(),
        "bias": False,
        "norm_variant_attn": "layernorm",
        "norm_variant_output": "layernorm",
        "activation_variant": "gelu",
        "use_rotary_embeddings": positions == "rotary",
        "use_abs_pos_embeddings": positions == "absolute",
    }


def ours(shape: Shape, positions: str = "absolute") -> nn.Module:
    from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM

    torch.manual_seed(0)
    return NanoGPTForCausalLM(NanoGPTConfig(**our_fields(shape, positions)))


def hf_gpt2(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head, n_positions=shape.block_size,
        vocab_size=shape.vocab_size, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def has_litgpt() -> bool:
    return importlib.util.find_spec("litgpt") is not None


def litgpt(shape: Shape) -> nn.Module:
    """Rotary positions, LayerNorms with bias and a head of its own: litgpt has no option for nanoGPT's."""
    from litgpt.config import Config
    from litgpt.model import GPT

    torch.manual_seed(0)
    config = Config(
        n_embd=shape.n_embd, n_layer=shape.n_layer, n_head=shape.n_head, block_size=shape.block_size,
        vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size, bias=False, parallel_residual=False,
        rotary_percentage=1.0,
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    return model


def litgpt_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def malloc_settings() -> str:
    """What the environment tells the allocator: large temporaries that go back to the system cost page faults."""
    names = sorted(name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "malloc at its defaults"
