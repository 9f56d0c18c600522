"""Tiny GradMem models with weights large enough for every part to matter, batches for them, and their references."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM
from tests.gradmem.references import PLAIN, Query, Reference


Fields = dict[str, Any]
REFUSED = (ValueError, StrictDataclassError)
VOCAB, WIDTH, POSITIONS = 12, 16, 40
TOKENS: Fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: Fields = {"n_mem_tokens": 3, "K": 2, "inner_lr": 0.7}
PROJECTED: Fields = {"use_mem_proj": True, "mem_proj_mode": "proj"}
OWN_PROJECTIONS: Fields = {"use_mem_proj": True, "mem_proj_mode": "per_sample"}
BOTH_CLIPS: Fields = {"inner_clip_value": 0.05, "inner_clip_norm": 0.1, "inner_lr": 3.0}
LORA: Fields = {"use_write_lora": True, "write_lora_r": 2, "write_lora_alpha": 6}

# Options of the configuration; `backbone` is none of them, it names the kind of the backbone.
CASES: dict[str, Fields] = {
    "default": {},
    "clip by value": {"inner_clip_value": 0.05, "inner_lr": 4.0},
    "clip by norm": {"inner_clip_norm": 0.2, "inner_lr": 4.0},
    "both clips": BOTH_CLIPS,
    "clips out of reach": {"inner_clip_value": 1e3, "inner_clip_norm": 1e3},
    "projection": PROJECTED,
    "own projections": OWN_PROJECTIONS,
    "own projections, both clips": {**OWN_PROJECTIONS, **BOTH_CLIPS},
    "write head": {"use_write_head": True},
    "control tokens": {"n_ctrl_tokens": 2},
    "learned rate": {"learn_inner_lr": True},
    "Adam": {"use_adam": True, "inner_lr": 0.1},
    "Adam, own projections, both clips": {**OWN_PROJECTIONS, **BOTH_CLIPS, "use_adam": True, "inner_lr": 0.1},
    "write LoRA": LORA,
    "inner loss added": {"add_inner_loss_to_outer": True, "inner_loss_weight": 0.3},
    "GPT-2, tied": {"backbone": "gpt2"},
    "GPT-2, untied": {"backbone": "gpt2 untied"},
    "GPT-2, write LoRA": {"backbone": "gpt2", **LORA},
    "everything": {
        "backbone": "gpt2", "n_ctrl_tokens": 1, "use_write_head": True, "learn_inner_lr": True, **BOTH_CLIPS, **LORA,
        **OWN_PROJECTIONS, "add_inner_loss_to_outer": True,
    },
}  # fmt: skip


def backbone_config(kind: str = "llama", **fields: Any) -> PreTrainedConfig:
    if kind == "llama":
        return LlamaConfig(**{
            "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, **TOKENS,
            "tie_word_embeddings": False, **fields,
        })  # fmt: skip
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(**{
        "vocab_size": VOCAB, "n_embd": WIDTH, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS,
        **TOKENS, **dropout, "tie_word_embeddings": kind == "gpt2", **fields,
    })  # fmt: skip


def config(case: str = "default", backbone_fields: Fields | None = None, **fields: Any) -> GradMemConfig:
    fields = {**SIZES, **CASES[case], **fields}
    backbone = backbone_config(fields.pop("backbone", "llama"), **(backbone_fields or {}))
    return GradMemConfig(base_config=backbone, **fields)


def enlarge(model: torch.nn.Module) -> None:
    """Gives every parameter a size at which the model is far from linear; the maps of memories stay near identity."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("inner_lr"):
                continue
            if "mem_proj" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.dim() > 1 or not parameter.any():
                parameter.normal_(std=0.35)
            else:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))


def build(case: str = "default", dtype: torch.dtype = torch.float64, **fields: Any) -> GradMemGPTForCausalLM:
    model = GradMemGPTForCausalLM(config(case, **fields)).double().eval()
    enlarge(model)
    return model.to(dtype)


@cache
def model(case: str = "default") -> GradMemGPTForCausalLM:
    """One in double precision and evaluation mode that tests share and leave as it is."""
    return build(case)


def with_options(one: GradMemGPTForCausalLM, **fields: Any) -> GradMemGPTForCausalLM:
    """A model of the same weights under another configuration."""
    fields = {**one.config.to_dict(), "base_config": copy.deepcopy(one.config.base_config), **fields}
    other = GradMemGPTForCausalLM(GradMemConfig(**fields)).to(one.dtype).train(one.training)
    other.load_state_dict(one.state_dict())
    return other


# ---- rows


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Tokens that are none of the special ones."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str = "right", value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, and their mask."""
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
    marks = [torch.ones_like(row) for row in rows]
    return padded, torch.nn.utils.rnn.pad_sequence(marks, batch_first=True, padding_side=side)


def contexts() -> list[Tensor]:
    """Of 8 and 5 tokens."""
    return [ids(8, seed=1), ids(5, seed=2)]


def queries(each: int = 2) -> list[list[Query]]:
    """`each` for either context, of 4 to 6 tokens, the last two of which are asked for."""
    rows = []
    for one in range(2):
        rows.append([])
        for other in range(each):
            tokens = ids(4 + (one + 2 * other) % 3, seed=10 + 2 * other + one)
            labels = torch.full_like(tokens, -100)
            labels[-2:] = tokens[-2:]
            rows[-1].append(Query(tokens, labels))
    return rows


def batch(each: int = 2, side: str = "right") -> dict[str, Tensor]:
    """What one call of training is given: both contexts, all queries."""
    context_ids, context_mask = pad(contexts(), side)
    rows = [row for group in queries(each) for row in group]
    input_ids, mask = pad([row.ids for row in rows], side)
    labels, _ = pad([row.labels for row in rows], side, -100)
    return {
        "context_ids": context_ids, "context_attention_mask": context_mask, "input_ids": input_ids,
        "attention_mask": mask, "labels": labels,
    }  # fmt: skip


# ---- references


def reference(one: GradMemGPTForCausalLM) -> Reference:
    """The definition with copies of the model's values, which ask for gradients of their own."""
    values = {name: p.detach().clone().requires_grad_() for name, p in one.named_parameters()}
    base = bare_backbone(one, PLAIN)
    weights = {weight_name(name): v for name, v in values.items() if "backbone." in name and ".lora_" not in name}
    return Reference(base, weights, values, one.config, write_deltas(one, values))


def bare_backbone(one: GradMemGPTForCausalLM, attention: str) -> PreTrainedModel:
    """A causal LM of transformers of the kind of the model's backbone. Its attention is noted in a copy of the
    configuration: the model looks at its own for what to use."""
    base = AutoModelForCausalLM.from_config(copy.deepcopy(one.config.base_config), attn_implementation=attention)
    return base.to(one.dtype).eval()


def write_deltas(one: GradMemGPTForCausalLM, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight of the backbone -> alpha / r B A, turned where the weight is kept turned (GPT-2)."""
    deltas = {}
    for name, first in values.items():
        if ".lora_A." in name:
            delta = one.config.write_lora_alpha / one.config.write_lora_r * values[name.replace("_A", "_B")] @ first
            deltas[weight_name(name)] = delta.T if isinstance(one.config.base_config, GPT2Config) else delta
    return deltas


def weight_name(name: str) -> str:
    """Of a parameter of the adapted backbone, or of an adapter: the weight's name in the backbone as it comes."""
    name = name.removeprefix("backbone.").replace(".base_layer", "")
    return re.sub(r"\.lora_[AB]\..*", ".weight", name)


def gradients(one: GradMemGPTForCausalLM, **inputs: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss of one call, and what it gives every parameter."""
    one = copy.deepcopy(one)
    loss = one(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in one.named_parameters()}


def gap(found: Tensor, expected: Tensor) -> float:
    """Length of the difference beside that of the expected."""
    return float((found - expected).norm() / expected.norm())
