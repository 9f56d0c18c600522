"""GPT-2 and nanoGPT checkpoints come in with equal logits, and go out; a checkpoint never runs code."""

import os
import pickle

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.bare_nanogpt import BareConfig, BareNanoGPT
from hf_gradtools.nanogpt import NanoGPTForCausalLM
from tests.nanogpt.tiny import build, ids


SIZES = {"vocab_size": 19, "n_layer": 2, "n_head": 4, "n_embd": 16}


def perturbed(model):
    """LayerNorms and biases as training leaves them, not at one and zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def gpt2(**options):
    return perturbed(GPT2LMHeadModel(GPT2Config(n_positions=12, bos_token_id=1, eos_token_id=2, **SIZES, **options)))


def bare(**options):
    return perturbed(BareNanoGPT(BareConfig(block_size=12, **SIZES, **options)).double())


@torch.no_grad()
def logits_of_bare(model, rows):
    """Of all positions: without targets nanoGPT computes the last one alone."""
    return model(rows, rows)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"activation_function": "relu", "n_inner": 24, "layer_norm_epsilon": 1e-3},
        {"reorder_and_upcast_attn": True},
    ],
    ids=["tied", "untied", "other sizes", "reordered"],
)
@torch.no_grad()
def test_gpt2_comes_in_with_its_logits(options):
    source, rows = gpt2(**options), ids(2, 12)
    ours = NanoGPTForCausalLM.from_gpt2(source)
    torch.testing.assert_close(ours(rows).logits, source(rows).logits, atol=1e-5, rtol=0)
    tied = ours.lm_head.weight is ours.transformer.wte.weight
    assert tied == options.get("tie_word_embeddings", True)


@torch.no_grad()
def test_gpt2_comes_in_from_a_folder(tmp_path):
    source, rows = gpt2(), ids(2, 12)
    source.save_pretrained(tmp_path)
    ours = NanoGPTForCausalLM.from_gpt2(str(tmp_path))
    torch.testing.assert_close(ours(rows).logits, source(rows).logits, atol=1e-5, rtol=0)


def test_an_imported_gpt2_shares_no_memory_with_it():
    source = gpt2()
    kept = source.transformer.wte.weight.clone()
    ours = NanoGPTForCausalLM.from_gpt2(source)
    with torch.no_grad():
        ours.transformer.wte.weight.zero_()
    assert torch.equal(source.transformer.wte.weight, kept)


@pytest.mark.parametrize("flag", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
def test_a_gpt2_that_scales_otherwise_is_refused(flag):
    with pytest.raises(ValueError, match=next(iter(flag))):
        NanoGPTForCausalLM.from_gpt2(gpt2(**flag))


def test_what_is_no_gpt2_is_refused():
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        NanoGPTForCausalLM.from_gpt2(other)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_a_nanogpt_checkpoint_comes_in_with_its_logits(bias, prefix, tmp_path):
    source, rows = bare(bias=bias), ids(2, 12)
    torch.save(source.checkpoint(prefix), tmp_path / "ckpt.pt")
    ours = NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
    torch.testing.assert_close(ours(rows).logits, logits_of_bare(source, rows), atol=1e-6, rtol=0)
    assert ours.config.bias == bias
    assert ours.lm_head.weight is ours.transformer.wte.weight


@torch.no_grad()
def test_a_checkpoint_with_pairs_of_neighbours_rotated_comes_in_with_its_logits(tmp_path):
    """The rows of q and k are put in the order in which our rotation pairs them."""
    source, rows = bare(bias=True, rotary=True), ids(2, 12)
    checkpoint = source.checkpoint()
    checkpoint["model_args"]["use_rotary_embeddings"] = True
    for name, value in checkpoint["model"].items():
        if ".c_attn." in name:  # from the bare model's halves to neighbours, as rotary forks of nanoGPT have them
            q, k, v = value.clone().split(16)
            q, k = (x.unflatten(0, (4, 2, 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
            checkpoint["model"][name] = torch.cat([q, k, v])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    ours = NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
    torch.testing.assert_close(ours(rows).logits, logits_of_bare(source, rows), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_model_goes_out_to_nanogpt_and_comes_back(tmp_path):
    source, rows, path = bare(bias=True), ids(2, 12), tmp_path / "ckpt.pt"
    torch.save(source.checkpoint(), path)
    ours = NanoGPTForCausalLM.from_nanogpt(path)
    ours.save_nanogpt(path)
    checkpoint = torch.load(path, weights_only=True)
    args = checkpoint["model_args"]
    again = BareNanoGPT(BareConfig(**args)).double().eval()
    again.load_state_dict(checkpoint["model"])
    assert torch.equal(logits_of_bare(again, rows), logits_of_bare(source, rows))
    assert torch.equal(NanoGPTForCausalLM.from_nanogpt(path)(rows).logits, ours(rows).logits)


def test_a_model_of_other_parts_does_not_go_out(tmp_path):
    with pytest.raises(ValueError, match="use_rotary_embeddings=True"):
        build().save_nanogpt(tmp_path / "ckpt.pt")
    assert list(tmp_path.iterdir()) == []


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["beside", "model", "model_args"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(where, tmp_path):
    checkpoint, touched = bare().checkpoint(), tmp_path / "touched"
    place = checkpoint if where == "beside" else checkpoint[where]
    place["extra"] = Malicious(touched)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="could run code"):
        NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
    assert not touched.exists()


def test_a_bare_pickle_that_would_run_code_is_refused_and_does_not(tmp_path):
    touched = tmp_path / "touched"
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": Malicious(touched), "model_args": {}}, protocol=2))
    with pytest.raises(ValueError, match="ckpt.pt"):
        NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_args"), "model_args"),
        (lambda c: c["model_args"].pop("n_embd"), "n_embd"),
        (lambda c: c["model"].pop("transformer.h.1.mlp.c_fc.weight"), "c_fc"),
        (lambda c: c["model"].update({"transformer.h.9.new": torch.ones(1)}), "h.9.new"),
    ],
    ids=["no arguments", "no width", "a weight missing", "a weight too many"],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(change, message, tmp_path):
    checkpoint = bare().checkpoint()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message):
        NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt\.pt"):
        NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
