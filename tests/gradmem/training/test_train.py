"""What a run leaves behind, the baseline, pretrained backbones, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_gradtools.gradmem import GradMemGPTForCausalLM
from hf_gradtools.gradmem.kv_retrieval import build_kv_tokenizer
from hf_gradtools.gradmem.training import TrainOptions, train
from tests.gradmem.training.reference import TASK, column, history, options


def test_a_run_leaves_model_tokenizer_figures_and_card(tmp_path):
    result = train(options(tmp_path / "run"))
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == result
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, GradMemGPTForCausalLM)
    memory = model.write(torch.tensor([tokenizer("!a:b!", add_special_tokens=False).input_ids]))
    query = torch.tensor([tokenizer("?!a:", add_special_tokens=False).input_ids])
    assert model.generate(query, memory=memory, max_new_tokens=2).shape == (1, 6)
    card = (folder / "README.md").read_text()
    for figure in ("generated_exact_match", "exact_match", "inner_loss_1"):
        assert f"{result['metrics'][figure]:.4f} |" in card
    assert f"| {result['wrong_context_exact_match']:.4f} |" in card
    assert str(tmp_path) not in card
    best = max(column(folder, "eval_exact_match"))
    assert result["metrics"]["exact_match"] == pytest.approx(best)
    assert result["chance"] == 0.25


def test_the_best_model_is_published_not_the_last(tmp_path):
    result = train(options(tmp_path, learning_rate=0.3, max_steps=10, eval_rows=40, seed=3))
    rows = [row for row in history(tmp_path) if "eval_loss" in row]
    best = max(rows, key=lambda row: (row["eval_exact_match"], -row["eval_loss"]))
    assert result["best_step"] == best["step"] < 10, "the last evaluation is the best one: choose another seed"
    assert result["metrics"]["loss"] == pytest.approx(best["eval_loss"], rel=1e-5)


def test_the_baseline_reads_the_context_in_its_prompt(tmp_path):
    result = train(options(tmp_path, vanilla=True, base_model="gpt2"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "GPT2LMHeadModel"
    assert not any("inner" in name for name in result["metrics"])
    assert "with the context in\nits prompt" in (tmp_path / "README.md").read_text()


def test_a_pretrained_backbone_keeps_its_weights_when_frozen(tmp_path):
    tokenizer = build_kv_tokenizer(4)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = {"base_model": None, "pretrained_model": str(tmp_path / "base"), "freeze_backbone": True, "max_steps": 2}
    train(options(tmp_path / "run", **run, use_mem_proj=True, mem_proj_mode="proj"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, base[name]), name
    assert not torch.equal(model.mem_proj.weight, torch.eye(16))
    with pytest.raises(ValueError, match="pass one of them"):
        options(tmp_path, **{**run, "base_model": "gpt2"})


def test_a_run_may_start_with_the_weights_of_another(tmp_path):
    train(options(tmp_path / "first", learning_rate=0.1))
    begun = {"init_checkpoint": str(tmp_path / "first"), "max_steps": 1, "learning_rate": 0.0, "eval_steps": 1}
    train(options(tmp_path / "second", **begun))
    best = json.loads((tmp_path / "first" / "results.json").read_text())["metrics"]["loss"]
    assert column(tmp_path / "second", "eval_loss")[0] == pytest.approx(best, rel=1e-5)
    with pytest.raises(ValueError, match="of a model of another shape"):
        train(options(tmp_path / "third", **begun, n_embd=32))
    train(options(tmp_path / "learned", learn_inner_lr=True, max_steps=1))
    with pytest.raises(ValueError, match=r"has inner_lr, which this model has not"):
        train(options(tmp_path / "fourth", **{**begun, "init_checkpoint": str(tmp_path / "learned")}))


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({"use_adam": True, "inner_clip_value": 0.1, "inner_clip_norm": 0.2}, {}),
        ({"n_ctrl_tokens": 1, "K": 2, "last_K_second_order": 1}, {"last_k_second_order": 1}),
        ({"use_mem_proj": True, "mem_proj_mode": "per_sample", "use_gradient_checkpointing": True}, {}),
        (
            {"use_write_lora": True, "write_lora_r": 2, "write_lora_target_modules": "q_proj, v_proj"},
            {"write_lora_target_modules": ["q_proj", "v_proj"]},
        ),
        ({"grad_mode": "none", "recompute_write": False, "attn_implementation": "eager"}, {}),
    ],
)
def test_options_of_the_memory_reach_the_model(given, config, tmp_path):
    train(options(tmp_path, max_steps=2, **given))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).config
    of_the_run = {"use_gradient_checkpointing", "attn_implementation", "last_K_second_order"}
    expected = {**{name: value for name, value in given.items() if name not in of_the_run}, **config}
    assert {name: getattr(saved, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data_path": "N2-what"}, "data_path='N2-what' is no folder, and no task"),
        ({"eval_steps": 0}, "eval_steps=0 must be at least 1"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type='polynomial' is unknown. Pass one of constant"),
        ({"base_model": "mamba"}, "base_model='mamba' is unknown. Pass one of gpt2, llama"),
        ({"n_embd": 15}, "n_embd=15 must be a multiple of n_head=2"),
        ({"grad_mode": "third"}, "grad_mode='third' is unknown"),
        ({"K": -1}, "K=-1 must be at least 0"),
        ({"init_checkpoint": "nowhere"}, "init_checkpoint='nowhere' holds no model.safetensors"),
        ({"data_path": "N20-K1V1-V4"}, "num_pairs=20 needs as many different keys, and there are 4"),
        ({"queries_per_context": 3}, "queries_per_context=3, and contexts have 2 pairs"),
        ({"max_position_embeddings": 8}, "past the 8 of the backbone"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(options(tmp_path / "run", **wrong))
    if "max_position_embeddings" not in wrong:
        assert not (tmp_path / "run").exists()


def test_gpt2_is_the_default_backbone():
    assert TrainOptions("out").base_model == "gpt2"
    assert TrainOptions("out", data_path=TASK, pretrained_model="some/model").base_model is None
