import json
import math
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.analysis import find_checkpoints


def write_state(folder, step, losses):
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"step": at, "eval_loss": loss} for at, loss in losses.items()] + [{"step": 1, "loss": 9.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))


def write_figures(folder, best, iteration, **more):
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"best_val_loss": best, "best_val_iter": iteration, "num_params": 7, "vocab_size": 20, **more}
    (folder / "training.json").write_text(json.dumps(figures))


def nanogpt_checkpoint(**more):
    """As nanoGPT's train.py writes it: the output layer is the embedding."""
    embedding = torch.randn(20, 4)
    weights = {"transformer.wte.weight": embedding, "lm_head.weight": embedding, "transformer.h.0.x": torch.ones(5)}
    return {
        "model": weights,
        "model_args": {"vocab_size": 20},
        "iter_num": 30,
        "best_val_loss": torch.tensor(1.25),
        **more,
    }


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_runs_of_every_kind_are_sorted_by_validation_loss(tmp_path):
    write_figures(tmp_path / "ours", 1.5, 40)
    write_state(tmp_path / "ours", 60, {20: 2.0, 40: 1.5, 60: 1.75})  # beside the best model
    write_state(tmp_path / "ours" / "checkpoint-60", 60, {20: 2.0, 40: 1.5, 60: 1.75})
    write_figures(tmp_path / "ours" / "checkpoint-60", 1.5, 40)
    (tmp_path / "old").mkdir()
    torch.save(nanogpt_checkpoint(), tmp_path / "old" / "ckpt.pt")
    config = LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "hf" / "checkpoint-5")
    write_state(tmp_path / "hf" / "checkpoint-5", 5, {})
    write_state(tmp_path / ".ours.unfinished", 60, {60: 0.1})
    old, run, last, untested = find_checkpoints(tmp_path)
    assert (old.path, old.best_val, old.iter, old.params, old.vocab_size) == ("old/ckpt.pt", 1.25, 30, 85, 20)
    assert (run.path, run.best_val, run.val_loss, run.iter, run.params) == ("ours", 1.5, 1.5, 40, 7)
    assert (last.path, last.best_val, last.best_iter) == ("ours/checkpoint-60", 1.5, 40)
    assert (last.val_loss, last.iter) == (1.75, 60)
    assert run.better_than_chance == pytest.approx(20 / math.exp(1.5))
    assert (untested.path, untested.best_val, untested.iter, untested.vocab_size) == ("hf/checkpoint-5", None, 5, 30)
    assert untested.params == model.num_parameters()
    assert not any(found.error for found in (old, run, last, untested))


def test_tied_weights_count_once(tmp_path):
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path / "checkpoint-1")
    write_state(tmp_path / "checkpoint-1", 1, {1: 3.0})
    assert find_checkpoints(tmp_path)[0].params == sum(parameter.numel() for parameter in model.parameters())


def test_exported_models_are_found(tmp_path):
    config = NanoGPTConfig(
        vocab_size=20, block_size=8, n_layer=1, n_head=1, n_embd=8, use_rotary_embeddings=False,
        use_abs_pos_embeddings=True, norm_variant_attn="layernorm", norm_variant_output="layernorm",
    )  # fmt: skip
    model = NanoGPTForCausalLM(config)
    model.save_nanogpt(tmp_path / "ckpt.pt")
    (found,) = find_checkpoints(tmp_path)
    assert (found.path, found.error, found.params) == ("ckpt.pt", "", model.num_parameters())


def test_pickled_code_is_not_run(tmp_path):
    torch.save(nanogpt_checkpoint(config=Malicious(str(tmp_path / "harm"))), tmp_path / "ckpt.pt")
    write_figures(tmp_path / "good", 2.0, 1)
    good, bad = find_checkpoints(tmp_path)
    assert (good.path, bad.path) == ("good", "ckpt.pt")
    assert "could run code" in bad.error
    assert not (tmp_path / "harm").exists()


def test_broken_files_have_an_error_and_stop_nothing(tmp_path):
    write_figures(tmp_path / "good", 2.0, 1)
    for name, text in {"cut": '{"best_val', "list": "[1]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(text)
    (tmp_path / "ckpt.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    found = find_checkpoints(tmp_path)
    assert [checkpoint.path for checkpoint in found] == ["good", "ckpt.pt", "cut", "list"]
    assert [bool(checkpoint.error) for checkpoint in found] == [False, True, True, True]


def test_other_orders_and_a_filter(tmp_path):
    for name, best, iteration in [("a", 3.0, 10), ("b", 2.0, 30), ("c", None, 20), ("d", math.nan, 5)]:
        write_figures(tmp_path / name, best, iteration)
    order = lambda **how: "".join(found.path for found in find_checkpoints(tmp_path, **how))  # noqa: E731
    assert [order(), order(reverse=True), order(sort="path"), order(sort="iter")] == ["bacd", "abcd", "abcd", "dacb"]
    assert order(path_regex="[ad]") == "ad"
    for wrong in ({"path_regex": "["}, {"sort": "size"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            find_checkpoints(tmp_path, **wrong)
    with pytest.raises(ValueError, match="is no folder"):
        find_checkpoints(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", '{"log_history": null}'),
        ("trainer_state.json", '{"log_history": [{"eval_loss": 1.0}]}'),
        ("training.json", '{"best_val_loss": "bad", "vocab_size": 3}'),
        ("training.json", '{"best_val_loss": -1e9, "vocab_size": 3}'),
    ],
)
def test_a_damaged_file_is_a_row_with_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (found,) = find_checkpoints(tmp_path)
    assert found.error
