"""A run of `train`: the losses of a plain loop, the folder it leaves, when it stops, what it refuses."""

from __future__ import annotations

import codecs
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import safe_globals

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.data import TokenFolder, prepare
from hf_gradtools.nanogpt.training import TrainOptions, train, workflow
from tests.nanogpt.training.reference import MODEL, TEXT, cosine, history, options, plain_losses


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("trained") / "out"
    return train(options(dataset, out_dir), MODEL), out_dir


@pytest.mark.parametrize(
    ("run", "model"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 3, "grad_clip": 0.1}, {}),
        ({"log_interval": 2, "decay_lr": True}, {"attention_variant": ["ssm"], "dropout": 0.2}),
    ],
)
def test_losses_are_those_of_a_plain_loop(run, model, dataset, tmp_path):
    asked = options(dataset, tmp_path / "out", **run, never_save_checkpoint=True)
    train(asked, {**MODEL, **model})
    expected = plain_losses(asked, {**MODEL, **model}, asked.max_iters)
    every = asked.log_interval
    means = [sum(expected[i : i + every]) / every for i in range(0, len(expected), every)]
    logged = [loss for _, loss in history(asked.out_dir, "loss")]
    assert logged == pytest.approx(means, rel=2e-5)
    assert logged[-1] < logged[0]


def test_schedule_is_nanogpt_s():
    run = TrainOptions(learning_rate=3e-3, min_lr=1e-4, warmup_iters=7, max_iters=50, lr_decay_iters=40)
    for iteration in range(60):
        assert run.learning_rate_at(iteration) == pytest.approx(cosine(iteration, 7, 40, 3e-3, 1e-4))
    steady = TrainOptions(learning_rate=3e-3, warmup_iters=7, decay_lr=False)
    assert [steady.learning_rate_at(i) for i in (0, 7, 4000)] == pytest.approx([3e-3 / 8, 3e-3, 3e-3])
    assert TrainOptions(warmup_iters=0, max_iters=10).learning_rate_at(0) == 1e-3


def test_the_logged_learning_rate_is_the_one_used(trained):
    run = options("", trained[1])
    for step, rate in history(trained[1], "learning_rate"):
        assert rate == pytest.approx(cosine(step - 1, run.warmup_iters, run.max_iters, run.learning_rate, 1e-3))


def test_folder_loads_as_any_other_and_has_the_loss_it_claims(trained, dataset):
    result, out_dir = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out_dir), AutoTokenizer.from_pretrained(out_dir)
    assert isinstance(model, NanoGPTForCausalLM)
    assert model.config.use_cache
    run = options(dataset, out_dir)
    blocks = TokenFolder(dataset).blocks("val", MODEL["block_size"], run.seed + 1)
    with torch.no_grad():
        losses = [model(**blocks.batch(range(i * 4, i * 4 + 4))).loss.item() for i in range(run.eval_iters)]
    assert sum(losses) / len(losses) == pytest.approx(result.best_val_loss, rel=1e-6)
    start = tokenizer("To be", return_tensors="pt")
    assert start["input_ids"].tolist() == [[sorted(set(TEXT)).index(c) for c in "To be"]]
    assert tokenizer.decode(model.generate(**start, max_new_tokens=20)[0]).startswith("To be")


def test_result_and_card_tell_what_the_run_logged(trained):
    result, out_dir = trained
    evaluations = history(out_dir, "eval_loss")
    assert [step for step, _ in evaluations] == [0, 4, 8, 12]
    assert (result.best_val_iter, result.best_val_loss) == min(evaluations, key=lambda row: row[1])
    assert result.val_loss == evaluations[-1][1]
    assert result.train_loss == history(out_dir, "loss")[-1][1]
    assert result.num_params == AutoModelForCausalLM.from_pretrained(out_dir).num_parameters()
    assert result.better_than_chance == pytest.approx(len(set(TEXT)) / math.exp(result.best_val_loss))
    assert result.iter_latency_ms > 0
    assert result.peak_memory_mb > 50
    card = (out_dir / "README.md").read_text()
    assert f"{result.best_val_loss:.4f} (iteration {result.best_val_iter})" in card
    assert f"{result.num_params:,} parameters" in card
    assert str(out_dir.parent) not in card


def test_nothing_is_printed_and_no_code_is_pickled(dataset, tmp_path, capfd):
    train(options(dataset, tmp_path / "out", max_iters=2), MODEL)
    assert capfd.readouterr().out == ""
    assert not list(tmp_path.rglob("training_args.bin"))
    for path in [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.pth")]:
        with safe_globals():  # transformers': NumPy's arrays, in the state of its generator
            torch.load(path, weights_only=True)


def test_progress_bar_and_evaluations_are_shown_on_request(dataset, tmp_path, capfd):
    lines = []
    train(options(dataset, tmp_path / "out", max_iters=4, progress=True), MODEL, echo=lines.append)
    assert [line[:18] for line in lines] == ["iter 0: val loss 3", "iter 4: val loss 2"]
    assert "4/4" in capfd.readouterr().err


def test_patience_ends_a_run_that_no_longer_improves(dataset, tmp_path):
    run = {"max_iters": 60, "eval_interval": 2, "learning_rate": 3.0, "warmup_iters": 0, "patience": 2}
    result = train(options(dataset, tmp_path / "out", **run), MODEL)
    evaluations = [step for step, _ in history(tmp_path / "out", "eval_loss")]
    assert evaluations[-1] == result.best_val_iter + 2 * 3
    assert result.iters == evaluations[-1] < 60
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == sorted([f"checkpoint-{result.best_val_iter}", f"checkpoint-{result.iters}"])
    again = train(options(dataset, tmp_path / "out", **run, init_from="resume"), MODEL)
    assert (again.iters, again.best_val_loss) == (result.iters, result.best_val_loss)


def test_the_best_model_is_published_not_the_last(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(workflow, "_finish", lambda *_: None)  # as of a run that is killed before its end
    run = options(dataset, tmp_path / "out", max_iters=12, learning_rate=3.0, warmup_iters=0)
    result = train(run, MODEL)
    assert result.best_val_iter < result.iters
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        best = tmp_path / "out" / f"checkpoint-{result.best_val_iter}" / name
        assert (tmp_path / "out" / name).read_bytes() == best.read_bytes()


def test_a_run_without_checkpoints_leaves_figures_only(dataset, tmp_path):
    result = train(options(dataset, tmp_path / "out", never_save_checkpoint=True), MODEL)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "run.json",
        "trainer_state.json",
        "training.json",
    ]
    figures = json.loads((tmp_path / "out" / "training.json").read_text())
    assert figures["best_val_loss"] == result.best_val_loss


def test_only_improvements_are_saved_if_asked(dataset, tmp_path):
    run = {"learning_rate": 3.0, "warmup_iters": 0, "always_save_checkpoint": False}
    result = train(options(dataset, tmp_path / "out", **run), MODEL)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{result.best_val_iter}"]


def test_samples_are_shown_and_do_not_disturb_the_training(dataset, trained, tmp_path):
    lines = []
    asked = {"sample_each_eval": True, "sample_start_tokens": "To be", "max_sample_tokens": 12}
    train(options(dataset, tmp_path / "out", **asked), MODEL, echo=lines.append)
    assert [len(line) for line in lines if line.startswith("To be")] == [17] * 4
    assert history(tmp_path / "out", "loss") == history(trained[1], "loss")


def test_eval_only_measures_and_writes_nothing(dataset, trained, tmp_path):
    result, out_dir = trained
    before = sorted(path.stat().st_mtime_ns for path in out_dir.rglob("*"))
    again = train(options(dataset, out_dir, init_from=str(out_dir), eval_only=True))
    assert again.val_loss == pytest.approx(result.best_val_loss, rel=1e-6)
    assert again.iters == 0
    assert sorted(path.stat().st_mtime_ns for path in out_dir.rglob("*")) == before


# ---- where it starts


def test_training_goes_on_from_a_folder_with_another_dropout(dataset, trained, tmp_path):
    result, out_dir = trained
    asked = options(dataset, tmp_path / "out", init_from=str(out_dir), max_iters=1)
    train(asked, {"dropout": 0.1, "n_embd": 16, "block_size": 4})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.dropout == 0.1
    with pytest.raises(ValueError, match="n_embd=32, but the model of init_from=.* has 16. Leave n_embd out"):
        train(options(dataset, tmp_path / "other", init_from=str(out_dir)), {"n_embd": 32})


def test_ids_that_mean_other_tokens_to_the_model_are_told(dataset, trained, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "rot13.txt").write_text(codecs.encode(TEXT, "rot13"))
    prepare(str(tmp_path / "rot13.txt"), tmp_path / "rot13")
    asked = {"init_from": str(trained[1]), "eval_only": True}
    train(options(dataset, tmp_path / "out", **asked))
    assert "other ids" not in caplog.text
    train(options(tmp_path / "rot13", tmp_path / "out", **asked))
    assert "have other ids in the tokenizer of init_from=" in caplog.text


def test_training_goes_on_from_a_checkpoint_of_nanogpt(dataset, tmp_path):
    config = NanoGPTConfig(
        vocab_size=len(set(TEXT)), n_layer=1, n_head=2, n_embd=16, block_size=8, use_rotary_embeddings=False,
        use_abs_pos_embeddings=True, norm_variant_attn="layernorm", norm_variant_output="layernorm",
    )  # fmt: skip
    NanoGPTForCausalLM(config).save_nanogpt(tmp_path / "ckpt.pt")
    asked = {"sample_each_eval": True, "max_sample_tokens": 20, "max_iters": 2}  # beyond the block, with positions
    lines = []
    train(options(dataset, tmp_path / "out", init_from=str(tmp_path / "ckpt.pt"), **asked), echo=lines.append)
    assert len(lines[-1]) == 21
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_abs_pos_embeddings


def test_names_that_begin_with_gpt2_are_imported(dataset, tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    names, make = [], NanoGPTForCausalLM.from_gpt2
    monkeypatch.setattr(NanoGPTForCausalLM, "from_gpt2", lambda name: [names.append(name), make(gpt2)][1])
    train(options(dataset, tmp_path / "out", init_from="gpt2-medium", learning_rate=0.0, max_iters=1))
    assert names == ["gpt2-medium"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.transformer.wte.weight, gpt2.transformer.wte.weight)


def test_any_causal_lm_can_be_trained(dataset, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    asked = options(dataset, tmp_path / "out", init_from=str(tmp_path / "llama"), max_iters=8)
    result = train(asked, {"block_size": 8})
    assert result.best_val_loss < history(tmp_path / "out", "eval_loss")[0][1]
    assert result.num_params == LlamaForCausalLM(config).num_parameters()


@pytest.mark.parametrize(
    ("run", "model", "message"),
    [
        ({"batch_size": 0}, {}, "batch_size=0 must be at least 1"),
        ({"min_lr": 1.0}, {}, "min_lr=1.0 is above learning_rate"),
        ({"dtype": "int8"}, {}, "dtype='int8' is unknown"),
        ({"dtype": "float16"}, {}, "does not train on the CPU"),
        ({"device": "abacus"}, {}, "device='abacus' is not to be had"),
        ({"dataset": "nowhere"}, {}, "dataset='nowhere' is no folder"),
        ({"report_to": "paper"}, {}, "report_to='paper': 'paper' is none of"),
        ({"init_from": "resume"}, {}, "holds no checkpoint to continue"),
        ({"sample_each_eval": True, "sample_start_tokens": "ß"}, {}, "sample_start_tokens='ß': character 'ß'"),
        ({"sample_each_eval": True, "sample_start_tokens": ""}, {}, "sample_start_tokens='' is no token"),
        ({"init_from": "./nowhere"}, {}, "init_from='./nowhere' cannot be loaded"),
        ({}, {"n_layers": 3}, "unknown options: n_layers. Did you mean n_layer"),
        ({}, {"vocab_size": 3}, "vocab_size=3, and the data in .* has ids up to"),
        ({}, {"block_size": 4000}, r"train.bin in .*: block_size=4000 needs 4001 tokens"),
        ({}, {"attention_variant": "casual"}, "attention_variant='casual'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run, model, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(options(**{"dataset": dataset, "out_dir": tmp_path / "out", **run}), {**MODEL, **model})
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten_unless_asked(dataset, tmp_path):
    train(options(dataset, tmp_path / "out", max_iters=4), MODEL)
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run"):
        train(options(dataset, tmp_path / "out"), MODEL)
    with pytest.raises(ValueError, match="was begun with batch_size=4, not 5"):
        train(options(dataset, tmp_path / "out", init_from="resume", batch_size=5, max_iters=4), MODEL)
    with pytest.raises(ValueError, match="lr_decay_iters=4, not 8"):
        train(options(dataset, tmp_path / "out", init_from="resume", max_iters=8), MODEL)
    result = train(options(dataset, tmp_path / "out", max_iters=2, overwrite_out_dir=True), MODEL)
    assert result.iters == 2
    assert not (tmp_path / "out" / "checkpoint-4").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "ckpt.pt", "training.json", "README.md"])
def test_a_model_without_checkpoints_is_not_overwritten_unless_asked(name, dataset, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, which the run would replace"):
        train(options(dataset, tmp_path), MODEL)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}
    train(options(dataset, tmp_path, max_iters=1, never_save_checkpoint=True, overwrite_out_dir=True), MODEL)


@pytest.mark.parametrize("rule", ["ndim", "name"])
def test_what_decays(rule, dataset, tmp_path):
    from hf_gradtools.nanogpt.training.arguments import training_arguments
    from hf_gradtools.nanogpt.training.trainer import BlockTrainer

    run = options(dataset, tmp_path / "out", decay_rule=rule, weight_decay=0.3)
    data = TokenFolder(dataset)
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=data.vocab_size, **MODEL, softmax_variant_attn="consmax"))
    trainer = BlockTrainer(model, training_arguments(run), run, data, 8, print)
    decayed, kept = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    if rule == "ndim":
        assert {p.dim() >= 2 for p in decayed["params"]} == {True}
        assert {p.dim() < 2 for p in kept["params"]} == {True}
    else:
        assert all("ln" in names[id(p)] or "norm" in names[id(p)] or "bias" in names[id(p)] for p in kept["params"])


def test_a_huge_finite_loss_has_figures(dataset, tmp_path):
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=len(set(TEXT)), tie_word_embeddings=False, **MODEL))
    model.lm_head.weight.data *= 1e6
    model.save_pretrained(tmp_path / "model")
    result = train(options(dataset, tmp_path / "out", init_from=str(tmp_path / "model"), eval_only=True))
    assert result.best_val_loss > 1000
    assert result.better_than_chance == 0.0


def test_file_names_of_a_run(trained):
    kept = {path.name for path in Path(trained[1]).iterdir() if not path.name.startswith("checkpoint-")}
    assert kept == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "run.json", "tokenizer.json",
        "tokenizer_config.json", "trainer_state.json", "training.json",
    }  # fmt: skip
