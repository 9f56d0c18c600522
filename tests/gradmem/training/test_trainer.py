"""What `GradMemTrainer` adds to Trainer: the rate of inner_lr, where rates end, what is logged, the order of rows."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gradtools.gradmem.training import train
from hf_gradtools.gradmem.training.stages import ShuffledRows, load_stage
from hf_gradtools.gradmem.training.trainer import GradMemTrainer
from tests.gradmem.training.reference import TASK, column, options


def test_a_learned_inner_lr_has_a_rate_of_its_own(tmp_path, monkeypatch):
    groups = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a, **k: [groups.append([(g["lr"], len(g["params"])) for g in self.param_groups]), step(self)][1],
    )
    train(options(tmp_path, learn_inner_lr=True, inner_lr_multiplier=7, max_steps=4))
    rates = [[rate for rate, _ in group] for group in groups]
    assert rates[1] == pytest.approx([0.005, 0.005, 0.035])  # half of the warm-up
    assert rates[3] == pytest.approx([0.01, 0.01, 0.07])
    assert groups[0][2][1] == 1
    assert len(set(column(tmp_path, "inner_lr"))) == 4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.inner_lr.item() != 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.0, 0.5, 1.0, 0.868198, 0.55, 0.231802]),
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates_end_above_0(schedule, expected, tmp_path):
    train(options(tmp_path, lr_scheduler_type=schedule, final_lr_ratio=0.1, eval_steps=6))
    assert column(tmp_path, "learning_rate") == pytest.approx([0.01 * share for share in expected], abs=1e-7)


def test_evaluation_is_logged_with_the_inner_losses_of_each_step(tmp_path):
    result = train(options(tmp_path, K=1, eval_K=3, max_steps=2))
    row = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][0]
    names = {name for name in row if name.startswith("eval_inner_loss_")}
    assert names == {f"eval_inner_loss_{step}" for step in range(4)}
    assert {"eval_exact_match", "eval_token_accuracy", "eval_generated_exact_match", "eval_memory_norm"} <= row.keys()
    assert result["K"] == 3
    assert result["metrics"]["inner_loss_3"] != result["metrics"]["inner_loss_2"]


def test_accumulated_batches_are_one_batch(tmp_path):
    train(options(tmp_path / "one", per_device_batch_size=8))
    train(options(tmp_path / "two", gradient_accumulation_steps=2))
    losses = [column(tmp_path / name, "loss") for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_rows_are_shuffled_anew_in_each_pass():
    rows = load_stage(TASK, seed=0, eval_rows=10).valid.add_column("number", list(range(10)))
    source = ShuffledRows(rows, seed=3)
    drawn = [row["number"] for row in source.rows(range(20))]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    again = [row["number"] for row in ShuffledRows(rows, seed=3).rows([12, 1])]
    assert again == [drawn[12], drawn[1]]


def test_generated_rows_depend_on_seed_and_number_alone():
    stage = load_stage(TASK, seed=0, eval_rows=50)
    far = stage.train.rows([5000, 3])
    assert load_stage(TASK, seed=0, eval_rows=5).train.rows([3]) == far[1:]
    other = load_stage(TASK, seed=1, eval_rows=50)
    assert other.train.rows(range(20)) != stage.train.rows(range(20))
    assert other.valid["context"][:] != stage.valid["context"][:]
    assert stage.train.rows(range(50)) != stage.valid.to_list()


def test_a_trainer_needs_to_know_when_it_ends():
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="max_steps=-1 must be at least 1"):
        GradMemTrainer(torch.nn.Linear(1, 1), TrainingArguments("out"), stages=[], data_collator=list)
