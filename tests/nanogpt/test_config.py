"""Configurations: names are checked and listed, lists go round, what cannot be is refused by name."""

import dataclasses

import pytest
import torch

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM, register
from hf_gradtools.nanogpt.registry import VARIANTS
from tests.nanogpt.tiny import REFUSED, SIZES, build, config, ids


@pytest.mark.parametrize(
    ("field", "kind"),
    [
        ("attention_variant", "attention"),
        ("mlp_variant", "mlp"),
        ("norm_variant_attn", "norm"),
        ("norm_variant_output", "norm"),
        ("activation_variant", "activation"),
        ("softmax_variant_attn", "softmax"),
        ("softmax_variant_output", "softmax"),
        ("linear_variant_attn", "linear"),
        ("linear_variant_mlp_down", "linear"),
    ],
)
@pytest.mark.parametrize("as_list", [False, True], ids=["name", "list"])
def test_an_unknown_name_is_refused_with_those_that_are_known(field, kind, as_list):
    if as_list and field.endswith("_output"):
        pytest.skip("one for the whole model")
    known = next(iter(VARIANTS[kind]))
    with pytest.raises(REFUSED) as refusal:
        config(**{field: [known, "nonesuch"] if as_list else "nonesuch"})
    message = str(refusal.value)
    assert field in message
    assert "nonesuch" in message
    assert all(name in message for name in VARIANTS[kind])


def test_lists_go_round_the_layers():
    one = build(n_layer=5, attention_variant=["causal", "ssm"], mlp_size=[8, 12, 16], window_size=[4, None])
    blocks = one.transformer.h
    assert [type(block.attn).__name__ for block in blocks[:3]] == [
        VARIANTS["attention"][name].__name__ for name in ("causal", "ssm", "causal")
    ]
    assert [block.mlp.c_fc.out_features for block in blocks] == [8, 12, 16, 8, 12]
    assert [block.attn.window for block in blocks if hasattr(block.attn, "window")] == [4, 4, 4]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_flash_lobo": True, "softmax_variant_attn": "consmax"}, ["use_flash_lobo", "consmax"]),
        ({"use_flash_lobo_per_head": True}, ["use_flash_lobo"]),
        ({"attention_variant": "ssm", "use_fire_embeddings": True}, ["use_fire_embeddings", "ssm"]),
        ({"attention_variant": "linear", "window_size": 4}, ["window_size", "linear"]),
        ({"attention_variant": ["ssm", "linear"], "attn_logit_softcapping": 3.0}, ["attn_logit_softcapping"]),
        ({"attention_variant": "identity", "use_qk_norm": True}, ["use_qk_norm", "identity"]),
        ({"n_head": 3}, ["n_embd=16", "n_head=3"]),
        ({"n_kv_group": 3}, ["n_kv_group=3", "n_head=4"]),
        ({"n_embd": 12, "n_head": 4}, ["use_rotary_embeddings", "3"]),
        ({"window_size": 0}, ["window_size=0"]),
        ({"window_size": [3, 5]}, ["window_size=[3, 5]"]),
        ({"n_layer": 0}, ["n_layer=0"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"attn_logit_softcapping": 0.0}, ["attn_logit_softcapping=0.0"]),
        ({"quantize_linear_bits": 1}, ["quantize_linear_bits=1"]),
        ({"attention_variant": []}, ["attention_variant=[]"]),
        ({"n_embd": "sixteen"}, ["n_embd"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_by_name(fields, named):
    with pytest.raises(REFUSED) as refusal:
        config(**fields)
    assert [part for part in named if part not in str(refusal.value)] == []


def test_every_field_survives_json(tmp_path):
    """Each with another value than its default, where one is allowed."""
    other = {bool: lambda v: not v, int: lambda v: v + 2, float: lambda v: v * 0.5 + 0.25}
    fields = {}
    for field in dataclasses.fields(NanoGPTConfig):
        value = field.default
        if type(value) in other and field.name not in ("transformers_version",):
            changed = {field.name: other[type(value)](value)}
            try:
                NanoGPTConfig(**{**SIZES, **changed})
            except REFUSED:
                continue
            fields |= changed
    assert len(fields) > 40
    for name, value in fields.items():
        one = NanoGPTConfig(**{**SIZES, name: value})
        one.save_pretrained(tmp_path)
        again = NanoGPTConfig.from_pretrained(tmp_path)
        assert getattr(again, name) == value
        assert again.to_dict() == one.to_dict()


def test_names_of_transformers_stand_for_ours():
    one = NanoGPTConfig(vocab_size=9, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    assert (one.n_embd, one.n_layer, one.n_head, len(one.layer_types)) == (16, 3, 2, 3)


def test_a_new_variant_is_one_class_and_one_decorator():
    @register("norm", "halved")
    class Halved(VARIANTS["norm"]["identity"]):
        def forward(self, x):
            return x / 2

    try:
        one = build(norm_variant_output="halved")
        assert isinstance(one.transformer.ln_f, Halved)
        assert one(ids(1, 3)).logits.isfinite().all()
        with pytest.raises(ValueError, match="exists already"):
            register("norm", "rmsnorm")(Halved)
    finally:
        del VARIANTS["norm"]["halved"]


def test_weights_begin_as_nanogpts_do():
    torch.manual_seed(0)
    one = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=400, block_size=8, n_layer=8, n_head=2, n_embd=64))
    block = one.transformer.h[3]
    assert one.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
        assert residual.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)


def test_parameters_of_variants_begin_where_the_papers_put_them():
    one = NanoGPTForCausalLM(config(softmax_variant_attn="consmax", use_fire_embeddings=True))
    attn = one.transformer.h[0].attn
    assert (attn.weighting.beta.item(), attn.weighting.gamma.item()) == (2.5, 100.0)
    assert attn.biases[0].c.item() == pytest.approx(0.1)
    lobo = NanoGPTForCausalLM(config(use_flash_lobo=True, use_flash_lobo_per_head=True)).transformer.h[0].attn
    assert lobo.off_by_one.log_const.tolist() == [0.0] * 4
    ssm = NanoGPTForCausalLM(config("attention=ssm")).transformer.h[0].attn
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 5.0).expand(32, 4))
    assert (ssm.D == 1).all()
