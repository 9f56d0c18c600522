"""Tiny models for the tests: every registered variant, every option, and thirty random combinations."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.registry import VARIANTS


Fields = dict[str, Any]
REFUSED = (ValueError, StrictDataclassError)
SIZES: Fields = {
    "vocab_size": 19, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 16, "mlp_expansion_factor": 2,
    "ssm_d_state": 4, "ssm_dt_rank": 3, "kan_middle_layers": [8], "fire_mlp_width": 8,
    "prmsnorm_pct": 0.5, "mla_rotary_dim": 4,
    "fire_init_L": 3.0,  # within the rows of the tests, so that FIRE depends on where the query stands
}  # fmt: skip
FIELD = {
    "attention": ["attention_variant"],
    "mlp": ["mlp_variant"],
    "norm": ["norm_variant_attn", "norm_variant_output"],
    "activation": ["activation_variant"],
    "softmax": ["softmax_variant_attn"],
    "linear": ["linear_variant_attn", "linear_variant_mlp"],
}
POSITIONS = {name: f"use_{name}_embeddings" for name in ("rotary", "fire", "abs_pos")}
NO_POSITIONS = dict.fromkeys(POSITIONS.values(), False)
# Names of ACT2FN whose functions draw random numbers or refuse ordinary inputs; they are not for a causal model.
ACTIVATIONS = [name for name in VARIANTS["activation"] if name not in ("rrelu",)]
LOBO = {"use_flash_lobo": True, "flash_lobo_log_const": 0.5}

OPTIONS: dict[str, Fields] = {
    "default": {},
    "gqa": {"n_kv_group": 2},
    "mqa by layer": {"n_kv_group": [1, 4]},
    "window": {"window_size": 3},
    "window by layer": {"window_size": [3, None]},
    "window consmax": {"window_size": 3, "softmax_variant_attn": "consmax"},
    "window fire": {"window_size": 3, **NO_POSITIONS, "use_fire_embeddings": True},
    "qk_norm": {"use_qk_norm": True, "use_qk_norm_scale": False},
    "qk_norm scale": {"use_qk_norm": True, "use_qk_norm_scale": True},
    "softcap": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "lobo": LOBO,
    "lobo per head": {**LOBO, "use_flash_lobo_per_head": True},
    "obo const": {**LOBO, "use_flash_obo_const": True},
    "lobo window gqa fire": {**LOBO, "window_size": 4, "n_kv_group": 2, "use_fire_embeddings": True},
    "strongermax obo": {"softmax_variant_attn": "strongermax", "strongermax_strength": 3.0, "strongermax_obo": 1.5},
    "no position": NO_POSITIONS,
    "all positions": dict.fromkeys(POSITIONS.values(), True),
    "bias": {"bias": True, "norm_variant_attn": "layernorm", "norm_variant_output": "layernorm"},
    "peri": {"use_peri_ln": True},
    "post": {"use_pre_ln": False, "use_post_ln": True},
    "parallel": {"use_parallel_mlp": True},
    "parallel peri": {"use_parallel_mlp": True, "use_peri_ln": True},
    "parallel post": {"use_parallel_mlp": True, "use_pre_ln": False, "use_post_ln": True},
    "untied": {"tie_word_embeddings": False},
    "ssm in turn": {"attention_variant": ["causal", "ssm"]},
    "recurrent first": {"attention_variant": ["linear", "causal"]},
    "ssm and linear": {"attention_variant": ["ssm", "linear"]},
    "infinite": {"attention_variant": "infinite", "n_head": 3, "n_qk_head_dim": 6, "n_v_head_dim": 5},
    "infinite concat": {"attention_variant": "infinite", "n_head": 3, "n_qk_head_dim": 6, "n_v_head_dim": 5,
                        "use_concat_heads": True},
    "mlp by layer": {"mlp_variant": ["kan", "swiglu"]},
    "softmax by layer": {"softmax_variant_attn": ["softmax", "consmax"]},
}  # fmt: skip


def _registered() -> dict[str, Fields]:
    cases = {}
    for kind, fields in FIELD.items():
        names = ACTIVATIONS if kind == "activation" else VARIANTS[kind]
        cases |= {f"{kind}={name}": dict.fromkeys(fields, name) for name in names}
    positions = {name: {**NO_POSITIONS, f"use_{name}_embeddings": True} for name in VARIANTS["position"]}
    return cases | {f"position={name}": fields for name, fields in positions.items()}


def _draw(rng: random.Random) -> Fields:
    """A combination, sometimes one that the configuration refuses."""
    mixers = list(VARIANTS["attention"])
    fields: Fields = {
        "attention_variant": rng.choice(
            ["causal", *mixers, *([name, "causal"] for name in mixers), rng.sample(mixers, 2)]
        ),
        "mlp_variant": rng.choice(list(VARIANTS["mlp"])),
        "norm_variant_attn": rng.choice(list(VARIANTS["norm"])),
        "norm_variant_output": rng.choice(list(VARIANTS["norm"])),
        "activation_variant": rng.choice(["gelu", "relu", "silu", "squared_relu", "gelu_new", "tanh"]),
        "softmax_variant_attn": rng.choice([*VARIANTS["softmax"], "softmax", "softmax", "softmax"]),
        "linear_variant_attn": rng.choice(["linear", "linear", *VARIANTS["linear"]]),
        "linear_variant_mlp": rng.choice(["linear", "linear", *VARIANTS["linear"]]),
        "n_kv_group": rng.choice([None, 1, 2]),
        "window_size": rng.choice([None, None, 4]),
        "use_qk_norm": rng.random() < 0.3,
        "attn_logit_softcapping": rng.choice([None, None, 5.0]),
        "final_logit_softcapping": rng.choice([None, 8.0]),
        "bias": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.7,
        "use_parallel_mlp": rng.random() < 0.3,
        "use_peri_ln": rng.random() < 0.3,
        **rng.choice([{}, {}, LOBO, {**LOBO, "use_flash_lobo_per_head": True}]),
    }
    return fields | {flag: rng.random() < 0.5 for flag in POSITIONS.values()}


def _random(count: int = 30) -> dict[str, Fields]:
    rng, cases, refused = random.Random(5), {}, 0
    while len(cases) < count:
        fields = _draw(rng)
        try:
            NanoGPTConfig(**SIZES, **fields)
        except REFUSED:
            refused += 1
            assert refused < 10 * count, f"nearly every combination is refused, such as {fields}"
            continue
        mixer = fields["attention_variant"]
        mixer = mixer if isinstance(mixer, str) else "-".join(mixer)
        name = f"{mixer} {fields['softmax_variant_attn']} {fields['mlp_variant']} {fields['norm_variant_attn']}"
        cases[f"random {len(cases)} {name}"] = fields
    return cases


CASES = {**_registered(), **OPTIONS, **_random()}
# An activation acts on each number alone; where only the mixing of tokens is asked for, one of them is enough.
MIXING = {name: fields for name, fields in CASES.items() if not name.startswith("activation=")} | {
    "activation=gelu": CASES["activation=gelu"]
}
QUANTIZED = ("bitlinear_1p58", "quantized_linear")


def config(case: str = "default", **fields: Any) -> NanoGPTConfig:
    return NanoGPTConfig(**{**SIZES, **CASES[case], **fields})


def build(case: str = "default", dtype: torch.dtype = torch.float64, **fields: Any) -> NanoGPTForCausalLM:
    """A new model whose weights are large enough for every part to be felt in the logits."""
    torch.manual_seed(1)
    model = NanoGPTForCausalLM(config(case, **fields)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.shape[-1] > 1 or (parameter == 0).all():
                parameter.normal_(std=0.3)
            else:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


@cache
def model(case: str = "default") -> NanoGPTForCausalLM:
    """One in evaluation mode, in double precision, that tests share and leave as it is."""
    return build(case)


def rounds(case: str) -> bool:
    """Whether the case rounds weights or inputs, so that its gradient is not that of its values."""
    fields = CASES[case]
    return fields.get("linear_variant_attn") in QUANTIZED or fields.get("linear_variant_mlp") in QUANTIZED


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))
