"""The workflow of `hf-gradtools grit train`, end to end on a tiny model."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_gradtools.grit.train import prepare_run
from hf_gradtools.grit.train_config import GritTrainConfig


pytestmark = pytest.mark.usefixtures("datasets_cache")


def question(i):
    return {"question": f"a {i % 10} b {i % 7}", "answer": str(i % 10), "topic": "c"}


@pytest.fixture
def options(tiny_model, tmp_path):
    """Makes the options of 6 steps on 12 of 16 rows, in which ranks are cut twice."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(question(i)) + "\n" for i in range(16)))
    usual = {
        "val": "4",
        "batch_size": 4,
        "max_steps": 6,
        "rank": 8,
        "rank_adaptation_threshold": 0.6,
        "dtype": "float32",
    }

    def options(**more):
        paths = {"model": str(tiny_model), "dataset": str(rows), "output_dir": str(tmp_path / "out")}
        return GritTrainConfig(**{**paths, **usual, **more})

    return options


@pytest.fixture
def frequent(monkeypatch):
    """A preset in which everything happens within a few steps."""
    happens = {"reprojection_freq": 3, "kfac_update_freq": 2, "grit_cov_update_freq": 1, "kfac_min_samples": 1}
    monkeypatch.setitem(sys.modules["hf_gradtools.grit.config"].PRESETS, "frequent", happens)
    return "frequent"


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_run_leaves_adapter_ranks_metrics_and_log(options, frequent, tmp_path):
    run = prepare_run(options(preset=frequent, logging_steps=2, eval_steps=3, warmup=0.5, lr_scheduler_type="cosine"))
    assert "12 rows of" in run.summary()
    assert "validation  4 rows" in run.summary()
    metrics = run.train()
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 6
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert 0 < metrics["reduction"] < 1
    assert "GRIT" in (out / "README.md").read_text()
    ranks = json.loads((out / "grit_ranks.json").read_text())
    assert ranks["parameters"] == metrics["parameters"] == sum(t.numel() for t in tensors(out).values())
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 3, 6, 6]
    assert any("grit/rank" in entry for entry in log)
    assert run.trainer.train_dataset.column_names == ["input_ids", "labels"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == metrics["parameters"]


def test_resumed_run_equals_an_unbroken_one(options, frequent, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    broken = options(preset=frequent, save_steps=2, eval_steps=3)
    run = prepare_run(broken)
    run.trainer.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run. Continue it by resume=True"):
        prepare_run(broken)
    with pytest.raises(ValueError, match="was begun with rank=8, not 4. Resume with the same options"):
        prepare_run(options(preset=frequent, rank=4, resume=True))
    resumed = prepare_run(options(preset=frequent, save_steps=2, resume=True)).train()
    unbroken = prepare_run(options(preset=frequent, output_dir=str(tmp_path / "unbroken"))).train()
    for name in set(resumed) - {"seconds"}:
        assert resumed[name] == unbroken[name], name
    left, right = tensors(tmp_path / "out"), tensors(tmp_path / "unbroken")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_gradient_checkpointing_changes_nothing(options, frequent, tmp_path):
    for name, checkpointing in (("with", True), ("without", False)):
        output_dir = str(tmp_path / name)
        prepare_run(options(preset=frequent, output_dir=output_dir, gradient_checkpointing=checkpointing)).train()
    left, right = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    for name in left:
        torch.testing.assert_close(left[name], right[name])


@pytest.mark.bnb
@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_quantises_the_base_model_only(options, checkpointing):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = prepare_run(options(qlora=True, dtype=None, max_steps=2, gradient_checkpointing=checkpointing))
    assert "4-bit, GRIT of rank 8" in run.summary()
    base = run.trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(base, bitsandbytes.nn.Linear4bit)
    assert base.weight.quant_type == "nf4"
    assert base.weight.quant_state.nested
    assert base.compute_dtype == torch.bfloat16
    assert {p.dtype for p in run.trainer.model.parameters() if p.requires_grad} == {torch.float32}
    metrics = run.train()
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]


@pytest.mark.parametrize("steps", [{}, {"preset": "short"}])
def test_options_reach_the_adapter_config(options, steps):
    more = {"rank": 2, "preconditioner": "none", "reprojection": "two_sided", "target_modules": "q_proj, v_proj"}
    config = prepare_run(options(**more, **steps)).trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.least_rank) == (2, 4, 2)
    assert (config.preconditioner, config.reprojection) == (None, "two_sided")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.ng_warmup_steps == (100 if steps else 0)


def test_format_row_makes_prompt_and_completion(options):
    def format_row(row):
        return {"prompt": f"Question : {row['question']}", "completion": row["answer"]}

    run = prepare_run(options(), format_row)
    assert run.held_out.column_names == ["sample_id", "prompt", "completion"]
    tokenizer = run.trainer.processing_class
    row = run.trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]).startswith("Question : a")
    assert tokenizer.decode([label for label in row["labels"] if label != -100]).endswith("<eos>")


@pytest.mark.parametrize(
    ("format_row", "message"),
    [
        (
            lambda row: {"prompt": row["passage"], "completion": ""},
            "rows.jsonl' has no column 'passage'. It has question",
        ),
        (lambda row: row["question"], "format_row made a 0 b 0 of a row of dataset="),
        (lambda row: {"prompt": "a", "completion": 1}, "both of them texts"),
    ],
)
def test_format_row_that_does_not_fit_is_told(options, format_row, message):
    with pytest.raises(ValueError, match=message):
        prepare_run(options(), format_row)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"preset": "medium"}, "preset='medium' is unknown. Pass one of short, long, seed"),
        ({"preconditioner": "adam"}, "preconditioner='adam' is unknown"),
        ({"lr_scheduler_type": "steep"}, "lr_scheduler_type='steep' is unknown. Pass one of linear"),
        ({"text_column": "body"}, "text_column='body' is no column of it. It has question, answer, topic"),
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"eval_steps": 0}, "eval_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"target_modules": "nothing"}, "nothing"),
        ({"resume": True}, "holds no run to continue. Start one without resume=True"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(options, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        prepare_run(options(**more))
    assert not list((tmp_path / "out").glob("*"))


def test_columns_and_format_row_exclude_each_other(options):
    with pytest.raises(ValueError, match="prompt_column='question' is not read beside format_row"):
        prepare_run(options(prompt_column="question", response_column="answer"), dict)


def test_resuming_before_the_first_checkpoint_is_refused(options, tmp_path):
    prepare_run(options()).train()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="holds no checkpoint to continue from"):
        prepare_run(options(resume=True))


def test_qlora_without_bitsandbytes_names_the_command_before_anything_is_loaded(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_gradtools\[bnb\]'"):
        prepare_run(options(qlora=True, model="nowhere/nothing"))
