"""The hardware report against closed forms written out here, and against torch's own counter."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM, hardware_report
from hf_gradtools.nanogpt.components import VARIANTS
from hf_gradtools.nanogpt.costs import Ops
from hf_gradtools.nanogpt.hardware import compare


L, H, E, W, T = 3, 4, 32, 65, 24  # layers, heads, width, vocabulary, context
D, F = E // H, 4 * E
SIZES = {"n_layer": L, "n_head": H, "n_embd": E, "vocab_size": W, "block_size": T}
TRIANGLE = T * (T + 1) // 2
LINEARS = L * (4 * E * E + 8 * E * E) + E * W  # macs of a token in linear maps: c_attn, c_proj, MLP; lm_head


def report(**config):
    return hardware_report(NanoGPTConfig(**{**SIZES, **config}))


def test_plain_model_in_closed_form():
    """RMSNorm, rotary, softmax, GELU, tied: every kind of operation, of all T tokens."""
    r = report()
    norms = (2 * L + 1) * T
    rotary = L * T * 2 * H * D
    scores = L * H * TRIANGLE
    assert r.params == W * E + L * (12 * E * E + 2 * E) + E
    assert r.state_bytes == 2 * L * T * 2 * E
    assert r.prefill_total == Ops(
        mac=T * LINEARS + 2 * scores * D,
        exp=scores,
        max=scores,
        div=L * H * T + norms,
        sqrt=norms,
        erf=L * T * F,
        mul=norms * (3 * E + 1) + 2 * rotary + 2 * scores + 3 * L * T * F,
        add=norms * (E + 1) + rotary + 2 * scores + L * T * F + 2 * L * T * E,
    )


def test_gpt2_like_model_in_closed_form():
    """LayerNorm, biases, absolute positions, tanh-GELU."""
    parts = {"norm_variant_attn": "layernorm", "norm_variant_output": "layernorm", "activation_variant": "gelu_new"}
    r = report(**parts, bias=True, use_rotary_embeddings=False, use_abs_pos_embeddings=True)
    assert r.params == W * E + T * E + L * (12 * E * E + 3 * E + E + F + E + 4 * E) + 2 * E
    assert r.decode_total.mac == LINEARS + 2 * L * H * T * D
    assert r.decode_total.tanh == L * F
    assert r.decode_total.erf == 0
    assert r.decode_total.sqrt == 2 * L + 1
    norm = 2 * E + E + 1 + E  # sums of mean and centring; of squares and eps; the bias
    softmax, biases = 2 * H * T, 3 * E + E + F + E
    assert r.decode_total.add == E + (2 * L + 1) * norm + L * (softmax + biases + 2 * F + 2 * E)


def test_consmax_reduces_no_row():
    r = report(softmax_variant_attn="consmax")
    assert r.prefill_total.exp == L * H * TRIANGLE
    assert r.prefill_total.max == 0
    assert r.prefill_total.div == (2 * L + 1) * T  # those of the norms


def test_relumax_has_no_exponential():
    r = report(softmax_variant_attn="relumax", activation_variant="relu")
    assert r.prefill_total.exp == 0
    assert r.prefill_total.max == L * H * TRIANGLE + L * T * F


def test_window_and_groups_bound_state_and_pairs():
    window, groups = 5, 2
    r = report(window_size=window, n_kv_group=groups)
    pairs = window * (window + 1) // 2 + (T - window) * window
    assert r.state_bytes == 2 * L * window * groups * 2 * D
    assert r.prefill_total.exp == L * H * pairs
    linears = L * (E * (E + 2 * groups * D) + E * E + 8 * E * E) + E * W
    assert r.prefill_total.mac == T * linears + 2 * L * H * pairs * D


def test_state_space_model_costs_the_same_at_every_token():
    ssm = {"attention_variant": "ssm", "ssm_d_state": 16, "ssm_dt_rank": 8, "ssm_conv_kernel_size": 3}
    r, c, n, rank = report(**ssm), 2 * E, 16, 8
    head = E * 2 * c + 3 * c + c * (rank + 2 * n) + rank * c + c * n + c * E
    assert r.decode_total.mac == L * (head + 8 * E * E) + E * W
    assert r.decode_total.exp == L * (2 * c + c + c * n)  # two SiLUs, a softplus, the decays
    assert r.state_bytes == L * c * (4 * n + 2 * 2)  # the state in float32, two inputs of the convolution
    assert hardware_report(NanoGPTConfig(**SIZES, **ssm), context=7).decode_total == r.decode_total


COMBINATIONS = [
    {},
    {"attention_variant": ["causal", "ssm", "linear"], "mlp_variant": ["mlp", "swiglu", "kan"]},
    {"use_fire_embeddings": True, "window_size": 6, "use_flash_lobo": True},
    {"attention_variant": "infinite", "n_qk_head_dim": 6, "n_v_head_dim": 10, "use_qk_norm": True},
    {"softmax_variant_attn": ["strongermax", "sigmoidmax", "polymax"], "use_peri_ln": True, "use_post_ln": True},
    {"norm_variant_attn": ["dact", "layernorm", "hyperspherenorm"], "attn_logit_softcapping": 20.0},
]


@pytest.mark.parametrize("config", COMBINATIONS, ids=str)
def test_prefill_is_the_sum_of_its_tokens(config):
    config = NanoGPTConfig(**{**SIZES, **config})
    tokens = [hardware_report(config, context=t).decode_total for t in range(1, T + 1)]
    assert sum(tokens, Ops()) == hardware_report(config).prefill_total


@pytest.mark.parametrize("config", [c for c in COMBINATIONS if "linear" not in str(c)], ids=str)
def test_macs_of_a_token_are_half_of_what_torch_counts(config):
    """One cached step with open weights: what torch counts then is what the report counts."""
    config = NanoGPTConfig(**{**SIZES, **config})
    model = NanoGPTForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, T, dtype=torch.long)
    with torch.no_grad():
        past = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=past)
    assert counter.get_total_flops() == 2 * hardware_report(config).macs_per_token


@pytest.mark.parametrize("config", COMBINATIONS, ids=str)
def test_parameters_are_those_of_the_model(config):
    config = NanoGPTConfig(**{**SIZES, **config})
    assert hardware_report(config).params == NanoGPTForCausalLM(config).num_parameters()


@pytest.mark.parametrize("kind", ["attention", "mlp", "norm", "softmax", "linear", "position"])
def test_every_variant_says_what_it_costs(kind):
    fields = {
        "attention": "attention_variant",
        "mlp": "mlp_variant",
        "norm": "norm_variant_attn",
        "softmax": "softmax_variant_attn",
        "linear": "linear_variant_mlp",
    }
    for name in VARIANTS[kind]:
        chosen = {f"use_{name}_embeddings": True} if kind == "position" else {fields[kind]: name}
        r = report(**chosen)
        assert r.decode_total.mac > 0
        assert all(value >= 0 for value in vars(r.decode_total).values())


def test_nothing_is_allocated():
    huge = NanoGPTConfig(n_layer=48, n_head=64, n_embd=16384, vocab_size=200_000)
    assert hardware_report(huge).params > 1e11


def test_comparison_has_a_row_for_every_kind_that_any_model_needs():
    rows = compare({"a": report(), "b": report(softmax_variant_attn="relumax", activation_variant="relu")})
    figures = {row["figure"]: (row["a"], row["b"]) for row in rows}
    assert figures["prefill exp"] == (L * H * TRIANGLE, 0)
    assert "prefill log" not in figures
    assert json.dumps(rows)


@pytest.mark.parametrize(
    ("config", "context", "message"),
    [
        ({}, 0, "context=0 must be at least 1"),
        ({"use_abs_pos_embeddings": True}, T + 1, f"context={T + 1} is past block_size={T}"),
    ],
)
def test_impossible_contexts_are_refused(config, context, message):
    with pytest.raises(ValueError, match=message):
        hardware_report(NanoGPTConfig(**{**SIZES, **config}), context=context)


def test_an_activation_without_a_count_is_named():
    with pytest.raises(ValueError, match="activation_variant='laplace': nobody counted"):
        report(activation_variant="laplace")
