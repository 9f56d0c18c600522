"""What the rows say besides dot products, and that they are said of the right sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Trainer

from hf_gradtools import GhostDotProdCallback
from hf_gradtools.ghost.sample_ids import content_hash
from tests.ghost.reference import as_batch, errors, gpt2, llama, reference_step, rows, sample_losses, train


VAL = rows(5, seed=9)


@pytest.mark.parametrize("args", [{}, {"dataloader_num_workers": 2}, {"train_sampling_strategy": "group_by_length"}])
def test_ids_and_hashes_find_the_row(args, tmp_path):
    data = rows(9)
    callback, recorder, _ = train(llama(), data, VAL, tmp_path, args=args)
    stored = callback.dataset[:]
    served = [row for step in recorder.steps for row in step["batches"][0][0]["input_ids"].tolist()]
    assert [data[i]["input_ids"] for i in stored["sample_id"]] == served
    assert stored["sample_hash"] == [content_hash(data[i]) for i in stored["sample_id"]]


def test_a_column_of_the_users_own_is_taken(tmp_path):
    data = rows(9).add_column("uid", [f"u{i}" for i in range(9)])
    args = {"remove_unused_columns": False}
    callback, _, _ = train(llama(), data, VAL, tmp_path, args=args, sample_id_column="uid")
    assert sorted(callback.dataset["sample_id"]) == [f"u{i}" for i in range(9)]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sample_mean_scale_is_the_gradient_of_the_samples_own_loss(make, accumulation, tmp_path):
    model = make()
    args = {"gradient_accumulation_steps": accumulation, "max_steps": 1}
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, args=args, scale="sample_mean")
    step = recorder.steps[0]
    for batch, _ in step["batches"]:
        batch["num_items_in_batch"] = 1
    sums, _ = reference_step(model, step, as_batch(VAL))
    counts = torch.cat([(b["labels"][:, 1:] != -100).sum(1) for b, _ in step["batches"]])
    torch.testing.assert_close(
        torch.tensor(callback.dataset["dot_product"][:]).double(), sums / counts, rtol=1e-4, atol=1e-7
    )


def test_losses_and_token_counts(tmp_path):
    model = llama()
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, sample_losses=True, args={"max_steps": 1})
    model.load_state_dict(recorder.steps[0]["weights"])
    batch = recorder.steps[0]["batches"][0][0]
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    data = callback.dataset[:]
    assert data["num_tokens"] == counts.tolist()
    assert data["sample_loss"] == pytest.approx((sample_losses(model, batch, 1) / counts).tolist(), rel=1e-5)
    assert data["train_loss"] == pytest.approx([float(sample_losses(model, batch, counts.sum()).sum())] * 3, rel=1e-5)


def test_layers_and_tokens_add_up(tmp_path):
    callback, _, _ = train(gpt2(), rows(9), VAL, tmp_path, per_layer=True, per_token=True)
    data = callback.dataset.with_format("numpy")[:]
    assert np.stack(data["layer_dot_products"]).sum(1) == pytest.approx(data["dot_product"], rel=1e-4, abs=1e-7)
    tokens = np.array([t.sum() for t in data["token_dot_products"]])
    assert tokens == pytest.approx(data["dot_product"], rel=1e-4, abs=1e-7)


def test_every_second_step_and_batches_of_the_validation_set(tmp_path):
    model = llama()
    callback, recorder, _ = train(
        model, rows(9), VAL, tmp_path, every_steps=2, val_batch_size=2, args={"max_steps": 5}, pairwise=True
    )
    data = callback.dataset[:]
    assert sorted(set(data["step"])) == [1, 3, 5]
    served = {step: tuple(ids) for step, ids in zip(data["step"], data["val_sample_ids"], strict=True)}
    assert len(served[1]) == 2
    assert not set(served[1]) & set(served[3])
    for step in (1, 3, 5):
        mine = [d for s, d in zip(data["step"], data["dot_product"], strict=True) if s == step]
        expected, _ = reference_step(model, recorder.steps[step - 1], as_batch(VAL.select(served[step])))
        torch.testing.assert_close(torch.tensor(mine).double(), expected, rtol=1e-4, atol=1e-7)


def test_optimizer_aware_values_follow_clipping(tmp_path):
    args = {"max_grad_norm": 1e-2, "max_steps": 3}
    callback, _, _ = train(llama(), rows(9), VAL, tmp_path, args=args, optimizer_aware=True)
    data = callback.dataset.with_format("numpy")[:]
    assert not data["dot_product"][data["step"] == 1].any()  # no second moment yet: the update is a sign
    later = data["step"] > 1
    ratio = data["value"][later] / (-data["learning_rate"] * data["dot_product"])[later]
    assert (ratio < 0.5).all()
    assert ratio.std() < 0.5 * ratio.mean()


def test_figures_reach_trainers_log(tmp_path):
    callback = GhostDotProdCallback(VAL, output_dir=str(tmp_path / "g"), val_batch_size=None)

    def make(callbacks, **kwargs):
        trainer = Trainer(callbacks=[callback], **kwargs)
        callback.set_trainer(trainer)
        return trainer

    _, _, trainer = train(llama(), rows(9), VAL, tmp_path, args={"logging_steps": 1}, trainer=make)
    logged = [entry for entry in trainer.state.log_history if "ghost/residual" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]


def test_eval_dataset_of_the_trainer_is_the_default(tmp_path):
    model = llama()
    callback = GhostDotProdCallback(output_dir=str(tmp_path / "g"), val_batch_size=None)

    def make(callbacks, **kwargs):
        trainer = Trainer(callbacks=[callback, callbacks[1]], eval_dataset=VAL, **kwargs)
        callback.set_trainer(trainer)
        return trainer

    _, recorder, _ = train(model, rows(9), VAL, tmp_path, trainer=make)
    assert errors(callback, recorder, model, VAL) < 1e-5


def test_label_smoothing_and_own_loss_function(tmp_path):
    """The values follow whatever loss trains: their sum is the product with the gradient, which the check compares."""
    callback, _, _ = train(llama(), rows(9), VAL, tmp_path / "smooth", args={"label_smoothing_factor": 0.1})
    assert max(callback.dataset["residual"]) < 1e-5

    def own_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean()

    callback, _, _ = train(
        llama(), rows(9), VAL, tmp_path / "own", trainer=lambda **kw: Trainer(compute_loss_func=own_loss, **kw)
    )
    assert max(callback.dataset["residual"]) < 1e-5


def test_rows_are_readable_while_training_runs(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Peek(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(callback_of[0].dataset))

    callback_of = []

    def make(callbacks, **kwargs):
        callback_of.append(callbacks[0])
        return Trainer(callbacks=callbacks, **kwargs)

    train(llama(), rows(9), VAL, tmp_path, trainer=make, callbacks=[Peek()])
    assert seen == [3, 6, 9]
