"""GRIT in trainers: nothing happens when it is off, everything when it is on, and a resumed run is the run."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_gradtools import GritCallback, GritConfig, GritTrainer
from hf_gradtools.grit.state import STATE_FILE, load_state
from tests.grit.reference import adapted, base_model, gap, rows, trainer


OFF = {"preconditioner": None, "reprojection": None, "lambda_kfac": 0.0, "lambda_reproj": 0.0}
BUSY = {"grit_cov_update_freq": 2, "kfac_update_freq": 3, "reprojection_freq": 4, "kfac_min_samples": 1}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_all_mechanisms_off_is_lora_bit_by_bit(kind, tmp_path):
    results = []
    for cls, config in ((Seq2SeqTrainer, LoraConfig), (GritTrainer, GritConfig)):
        options = {"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "lora_dropout": 0.1}
        base = base_model(kind)
        torch.manual_seed(7)
        model = get_peft_model(base, config(**options, **(OFF if config is GritConfig else {})))
        run = trainer(model, rows(padded=True, kind=kind), tmp_path, cls, args={"gradient_accumulation_steps": 2})
        run.train()
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("preconditioner", ["rank_soap", "kfac", "grit", None])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_trains_every_kind_of_model(kind, preconditioner, tmp_path):
    model = adapted(kind, preconditioner=preconditioner, trained=False, **BUSY)
    run = trainer(
        model, rows(16, padded=True, kind=kind), tmp_path,
        args={"max_steps": 24, "learning_rate": 5e-3, "gradient_accumulation_steps": 2, "weight_decay": 0.01},
    )  # fmt: skip
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.02
    assert run.controller.step == 24
    assert run.controller.failed_inversions == run.controller.skipped_sums == 0


def test_statistics_with_accumulation_under_trainer(tmp_path):
    """Two micro-batches of 4 rows, or one of 8: the same factors, by Trainer's own loss scale."""
    factors = []
    for size, parts in ((4, 2), (8, 1)):
        model = adapted(grit_cov_update_freq=1, reprojection=None)
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        run = trainer(model, rows(8, padded=True), tmp_path, args=args)
        run.train()
        factors.append(run.controller.fishers)
    for name, fisher in factors[0].items():
        assert fisher.samples == factors[1][name].samples
        assert gap(fisher.factors, factors[1][name].factors) < 1e-4


def test_evaluation_in_between_changes_nothing(tmp_path):
    results = []
    for strategy in ("no", "steps"):
        model = adapted(trained=False, **BUSY)
        args = {"eval_strategy": strategy, "eval_steps": 1, "max_steps": 8}
        trainer(model, rows(), tmp_path, args=args, eval_dataset=rows(4, seed=9)).train()
        results.append(weights(model))
    assert same(*results)


def test_generation_metrics_of_an_encoder_decoder(tmp_path):
    run = trainer(
        adapted("t5", **BUSY), rows(8, kind="t5"), tmp_path, eval_dataset=rows(4, kind="t5"),
        args={"predict_with_generate": True, "generation_max_length": 8, "max_steps": 2},
        compute_metrics=lambda p: {"length": float(p.predictions.shape[1])},
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_length"] > 0


def test_any_trainer_by_the_callback(tmp_path):
    """`Trainer` with the callback does what `GritTrainer` does."""
    results = []
    for cls, callbacks in ((GritTrainer, []), (Trainer, [GritCallback()])):
        model = adapted(trained=False, **BUSY)
        run = trainer(
            model, rows(padded=True), tmp_path / cls.__name__, cls, args={"max_steps": 10}, callbacks=callbacks
        )
        run.train()
        results.append(weights(model))
        assert (tmp_path / cls.__name__ / "grit_ranks.json").exists()
    assert same(*results)


def test_figures_are_logged_and_ranks_written(tmp_path):
    logged = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    model = adapted(trained=False, lambda_kfac=1e-4, lambda_reproj=1e-4, **BUSY)
    run = trainer(model, rows(), tmp_path, args={"max_steps": 9}, callbacks=[Reporter()])
    run.train()
    names = {name for row in logged for name in row}
    assert {
        "grit/rank", "grit/parameters", "grit/reduction", "grit/effective_rank_a", "grit/effective_rank_g",
        "grit/top_eigenvalue_a", "grit/top_eigenvalue_g", "grit/natural_grad_norm", "grit/loss_kfac",
        "grit/loss_reproj", "grit/damping", "grit/base_parameters",
    } <= names  # fmt: skip
    assert any("grit/rank" in row for row in run.state.log_history)
    report = json.loads((tmp_path / "grit_ranks.json").read_text())
    assert {name: row["rank"] for name, row in report["layers"].items()} == model.base_model.ranks()
    first = next(iter(report["layers"].values()))
    assert {"rank", "base_rank", "parameters", "k_a", "k_b", "effective_rank_a", "balanced"} <= set(first)
    assert report["parameters"] == sum(p.numel() for p in weights(model).values())
    assert report["reduction"] == pytest.approx(1 - report["parameters"] / report["base_parameters"])


def test_clip_after_bounds_what_the_preconditioner_returns(tmp_path):
    seen = {}

    class Norms(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            inner.register_step_pre_hook(lambda o, a, k: self.note(inner))

        def note(self, optimizer):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen.setdefault(self.name, []).append(float(torch.stack([g.norm() for g in grads]).norm()))

    for clip in ("before", "after"):
        model = adapted(preconditioner="kfac", grafting=False, kfac_damping=1e-2, **BUSY)
        norms = Norms()
        norms.name = clip
        run = trainer(model, rows(), tmp_path, clip=clip, args={"max_grad_norm": 0.05}, callbacks=[norms])
        run.remove_callback(norms)
        run.add_callback(norms)  # after GRIT's own, so that its hook sees what the optimizer gets
        run.train()
    assert max(seen["after"]) <= 0.05 * 1.001
    assert max(seen["before"]) > 0.1


def run_with_stop(path, stop, total=14, resume_path=None, **options):
    """Trains to `total` steps, saving at `stop`; or takes up from there."""
    model = adapted(trained=False, lora_dropout=0.1, adaptive_schedule=True, **BUSY, **options)
    args = {"max_steps": total, "save_strategy": "steps", "save_steps": stop, "lr_scheduler_type": "cosine"}
    run = trainer(model, rows(20, padded=True), path, args=args)
    run.train(resume_from_checkpoint=resume_path)
    return model, run


@pytest.mark.parametrize("preconditioner", ["rank_soap", "kfac"])
@pytest.mark.parametrize("stop", [3, 5, 10])
def test_resumed_run_is_the_uninterrupted_one(preconditioner, stop, tmp_path):
    """Factors, bases, ranks, moments and schedule: bit by bit, also across cuts at steps 4, 8 and 12."""
    options = {"preconditioner": preconditioner, "rank_adaptation_threshold": 0.9}
    whole, first = run_with_stop(tmp_path / "a", stop, **options)
    assert min(whole.base_model.ranks().values()) < 6
    shutil.copytree(tmp_path / "a" / f"checkpoint-{stop}", tmp_path / "elsewhere" / f"checkpoint-{stop}")
    again, second = run_with_stop(
        tmp_path / "b", stop, resume_path=str(tmp_path / "elsewhere" / f"checkpoint-{stop}"), **options
    )
    assert same(weights(whole), weights(again))
    assert first.controller.live_ranks == second.controller.live_ranks
    for name, fisher in first.controller.fishers.items():
        assert torch.equal(fisher.average, second.controller.fishers[name].average)
        assert (fisher.weight, fisher.samples) == (
            second.controller.fishers[name].weight, second.controller.fishers[name].samples,
        )  # fmt: skip
    assert list(first.controller.losses.losses) == list(second.controller.losses.losses)
    states = [run.controller.optimizer.state for run in (first, second)]
    for mine, theirs in zip(whole.base_model.layers(), again.base_model.layers(), strict=True):
        for letter in "AB":
            left, right = states[0][getattr(mine, letter)], states[1][getattr(theirs, letter)]
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_without_the_state_the_runs_would_differ(tmp_path):
    whole, _ = run_with_stop(tmp_path / "a", 5)
    checkpoint = tmp_path / "a" / "checkpoint-5"
    os.remove(checkpoint / STATE_FILE)
    with pytest.raises(ValueError, match=f"holds no {STATE_FILE}"):
        run_with_stop(tmp_path / "b", 5, resume_path=str(checkpoint))


def test_state_of_another_adapter_is_refused(tmp_path):
    run_with_stop(tmp_path / "a", 3, total=3)
    other = trainer(adapted(target_modules=["q_proj"], reprojection=None), rows(), tmp_path / "b")
    other.train()
    with pytest.raises(ValueError, match="is another adapter's: it knows"):
        load_state(other.controller, tmp_path / "a" / "checkpoint-3")
    other = trainer(adapted(r=4, **BUSY), rows(), tmp_path / "b", args={"max_steps": 1})
    other.train()
    with pytest.raises(ValueError, match="it has rank 6 for .*, whose rank is 4 here"):
        load_state(other.controller, tmp_path / "a" / "checkpoint-3")


def test_best_checkpoint_keeps_its_own_ranks(tmp_path):
    """The last step has smaller ranks than the best checkpoint, which is loaded before training ends."""
    model = adapted(trained=False, rank_adaptation_threshold=0.6, **{**BUSY, "reprojection_freq": 6})
    args = {
        "max_steps": 10, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
        "load_best_model_at_end": True, "metric_for_best_model": "marker", "greater_is_better": False,
    }  # fmt: skip

    run = trainer(
        model, rows(), tmp_path, args={**args, "metric_for_best_model": "eval_marker"},
        eval_dataset=rows(4), compute_metrics=lambda p: {"marker": float(run.state.global_step)},
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    assert set(model.base_model.ranks().values()) == {6}
    report = json.loads((tmp_path / "grit_ranks.json").read_text())
    assert report["steps"] == 4
    assert report["reduction"] == 0


def test_trainer_can_train_twice(tmp_path):
    run = trainer(adapted(trained=False, **BUSY), rows(), tmp_path)
    run.train()
    run.train()
    assert run.controller.step == 6
    assert not run.controller._remove


def test_interrupted_training_leaves_no_hooks(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = adapted(**BUSY)
    run = trainer(model, rows(), tmp_path, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not any(layer.down._forward_hooks for layer in model.base_model.layers())
