"""`GradProjCallback` in real Trainer runs, each row against one backward pass per sample in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_gradtools.ghost.gradproj.callback import GradProjCallback
from hf_gradtools.ghost.gradproj.projector import GradProjector
from tests.distributed.test_distributed import torchrun
from tests.ghost.gradproj.reference_projection import error, expected_rows, project_by_hand, unpadded
from tests.ghost.reference import Recorder, gpt2, llama, per_sample_gradients, rows, sample_losses
from tests.ghost.test_models import adapted


OPTIONS = {"layers": None, "proj_rank_total": 100, "rank": (5, 6), "dtype": "float32"}


def train(model, data, path, *, args=None, trainer=Trainer, callback=None, resume=None, **options):
    callback = callback or GradProjCallback(output_dir=path / "rows", **{**OPTIONS, **options})
    recorder = Recorder()
    defaults = {
        "output_dir": str(path / "out"), "per_device_train_batch_size": 3, "max_steps": 3, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 1,
    }  # fmt: skip
    arguments = TrainingArguments(**{**defaults, **(args or {})})
    run = trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback, recorder])
    run.train(resume_from_checkpoint=resume)
    return callback, recorder


def reference(model, recorder, dtype=torch.float64, dropout=False, **options):
    """`[M, dim]`: the gradient of each sample's own mean loss, in the order in which samples were served."""
    projector = GradProjector(model, **{**OPTIONS, **options})
    found = []
    for step in recorder.steps:
        twin = copy.deepcopy(model)
        for module in twin.modules():
            module.__dict__.pop("forward", None)  # patched by accelerate (autocast)
        twin.load_state_dict(step["weights"])
        twin = twin.to(dtype).train(dropout)
        names = [n for n, p in twin.named_parameters() if p.requires_grad]
        for batch, rng in step["batches"]:
            counts = (batch["labels"][:, 1:] != -100).sum(1)
            torch.random.set_rng_state(rng)
            for grads in per_sample_gradients(twin, sample_losses(twin, batch, counts)):
                found.append(project_by_hand(projector, dict(zip(names, grads, strict=True))))
    return torch.stack(found)


def collected(callback):
    return callback.store.rows(range(len(callback.store)))


@pytest.mark.parametrize("make", [gpt2, llama], ids=["conv1d_layernorm_tied", "linear_rmsnorm_tied"])
def test_rows_are_the_samples_own_gradients(make, tmp_path):
    model = make()
    callback, recorder = train(model, rows(9), tmp_path)
    assert error(collected(callback), reference(model, recorder)) < 1e-5
    assert callback.store.complete
    assert callback.store.column("step").tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert sorted(callback.store.sample_ids) == list(range(9))


@pytest.mark.parametrize(
    "args",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 1},
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2},
    ],
    ids=["accumulation", "clipping", "checkpointing", "reentrant", "batch_of_one", "workers", "short_last_group"],
)
def test_training_arguments(args, tmp_path):
    model = llama()
    callback, recorder = train(model, rows(10 if "num_train_epochs" in args else 26), tmp_path, args=args)
    assert error(collected(callback), reference(model, recorder)) < 1e-5


def test_fitted_ranks_and_a_sum(tmp_path):
    model = llama()
    callback, recorder = train(model, rows(9), tmp_path, rank="auto", loss_reduction="sum")
    projector = GradProjector(llama(), **{**OPTIONS, "rank": "auto", "loss_reduction": "sum"})
    projector.adopt(tmp_path / "rows", any_weights=True)
    ranks = callback.store.identity["ranks"]
    assert {name: list(block.ranks) for name, block in projector.projection.blocks.items()} == ranks
    counts = torch.from_numpy(callback.store.column("num_tokens").copy())
    twin = llama()
    twin.load_state_dict(recorder.steps[0]["weights"])
    batch, _ = recorder.steps[0]["batches"][0]
    mine = collected(callback)[:3] / counts[:3, None]
    names = [n for n, _ in twin.named_parameters()]
    targets = (batch["labels"][:, 1:] != -100).sum(1)
    losses = sample_losses(twin.double(), batch, targets)
    expected = [
        project_by_hand(projector, dict(zip(names, grads, strict=True)))
        for grads in per_sample_gradients(twin, losses)
    ]
    assert error(mine, torch.stack(expected)) < 1e-5


def test_left_padding_and_dropout(tmp_path):
    model = gpt2(dropout=0.1)
    callback, recorder = train(model, rows(9, pad_left=True), tmp_path, args={"use_cpu": True})
    expected = reference(model, recorder, dtype=torch.float32, dropout=True)
    assert error(collected(callback), expected) < 1e-5


def test_bfloat16_autocast(tmp_path):
    model = llama()
    callback, recorder = train(model, rows(9), tmp_path, args={"bf16": True})
    assert error(collected(callback), reference(model, recorder)) < 1e-2


def test_lora_with_checkpointing_and_accumulation(tmp_path):
    model = adapted(llama(), target_modules="all-linear")
    args = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    callback, recorder = train(model, rows(14), tmp_path, args=args)
    assert error(collected(callback), reference(model, recorder)) < 1e-5


def test_packed_rows_are_told_apart(tmp_path):
    data = [{k: v[0].tolist() for k, v in unpadded(row).items()} for row in rows(9)]
    callback, recorder = train(
        llama(), Dataset.from_list(data), tmp_path, args={"learning_rate": 0.0, "max_steps": 2},
        trainer=lambda **kw: Trainer(data_collator=DataCollatorWithFlattening(), **kw),
    )  # fmt: skip
    store = callback.store
    assert len(store) == 6
    assert len({*store.sample_ids.tolist()}) == 6
    projector = GradProjector(llama(), **OPTIONS)
    # Flattening hides the first label of each document, as the shift does.
    expected = expected_rows(projector, [data[i] for i in store.sample_ids])
    assert error(collected(callback), expected) < 1e-5


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("steps", [1, 2], ids=["plain", "accumulation"])
def test_trls_fused_head(steps, tie, tmp_path):
    trl = pytest.importorskip("trl")
    from tests.ghost.test_sft import tiny_tokenizer

    model = llama(tie=tie)
    data = [{"input_ids": unpadded(row)["input_ids"][0].tolist()} for row in rows(6)]
    callback = GradProjCallback(output_dir=tmp_path / "rows", **OPTIONS)
    args = trl.SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=3 // steps, max_steps=2, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, learning_rate=0.0, gradient_checkpointing=False, max_length=16,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, gradient_accumulation_steps=steps,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(data), processing_class=tiny_tokenizer(), callbacks=[callback]
    )
    trainer.train()
    labelled = [{**data[i], "labels": data[i]["input_ids"]} for i in callback.store.sample_ids]
    assert len(labelled) == (6 if steps == 1 else 4)
    assert error(collected(callback), expected_rows(GradProjector(llama(tie=tie), **OPTIONS), labelled)) < 1e-5


# ---- as a run


def test_weights_are_bit_equal_with_and_without(tmp_path):
    def run(callbacks):
        model = gpt2(dropout=0.1)
        args = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=3, max_steps=4, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows(12), callbacks=callbacks).train()
        return model

    plain = run([])
    batches = run([GradProjCallback(output_dir=tmp_path / "a", layers=None)])
    whole = run([GradProjCallback(rows(5), output_dir=tmp_path / "b", every_steps=2)])
    for p, q, r in zip(plain.parameters(), batches.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    for model in (batches, whole):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_second_step_and_an_evaluation_in_between(tmp_path):
    model = llama()
    args = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
    callback, recorder = train(
        model, rows(12), tmp_path, args=args, every_steps=2, trainer=lambda **kw: Trainer(eval_dataset=rows(4), **kw)
    )
    assert callback.store.column("step").tolist() == [2] * 3 + [4] * 3
    recorder.steps = recorder.steps[1::2]
    assert error(collected(callback), reference(model, recorder)) < 1e-5


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, _ = train(llama(), rows(22), tmp_path / "whole", args=args)
    first = {**args, "max_steps": 6}

    class Stop(GradProjCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 5:
                raise KeyboardInterrupt

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train(llama(), rows(22), folder, args=first, callback=Stop(output_dir=folder / "rows", **OPTIONS))
    resumed, _ = train(llama(), rows(22), folder, args=args, resume=str(folder / "out" / "checkpoint-4"))
    assert resumed.store.column("step").tolist() == whole.store.column("step").tolist()
    assert resumed.store.sample_ids.tolist() == whole.store.sample_ids.tolist()
    assert torch.equal(collected(resumed), collected(whole))


def test_a_finished_run_is_not_overwritten(tmp_path):
    train(llama(), rows(9), tmp_path)
    with pytest.raises(ValueError, match="holds the 9 rows of a finished run"):
        train(llama(), rows(9), tmp_path)


def test_a_dataset_at_checkpoints_is_searched_as_an_ensemble(tmp_path):
    data, model = rows(7), llama()
    callback = GradProjCallback(data, output_dir=tmp_path / "rows", on_save=True, **OPTIONS)
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(model, rows(12), tmp_path, args=args, callback=callback)
    ensemble = callback.ensemble()
    rates = [store.extra["learning_rate"] for store in ensemble.stores]
    assert [store.extra["step"] for store in ensemble.stores] == [2, 4]
    assert rates == pytest.approx([0.0075, 0.0025])  # of the step before, not of the next
    projectors = [
        GradProjector(str(tmp_path / "out" / f"checkpoint-{n}"), **OPTIONS, data_collator=None) for n in (2, 4)
    ]
    queries = rows(2, seed=3)
    total = 0.0
    for store, projector, weight in zip(ensemble.stores, projectors, ensemble.weights, strict=True):
        store.bind(projector)
        mine = store.rows(range(7))
        assert error(mine, expected_rows(projector, data)) < 1e-5
        total = total + weight * projector.gradients(queries).double() @ mine.double().T
    found = ensemble.search(queries, k=7)
    for q in range(2):
        scores = {row["row"]: row["score"] for row in found if row["query"] == q}
        assert error(torch.tensor([scores[i] for i in range(7)]), total[q]) < 1e-5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dataset": rows(3)}, "without when to project"),
        ({"on_save": True}, "pass dataset="),
        ({"dataset": rows(3), "steps": [1], "every_steps": 2}, "both say when"),
        ({"dataset": rows(3).select([]), "steps": [1]}, "dataset has 0 rows"),
        ({"every_steps": 0}, "every_steps=0"),
        ({"rank": -1}, "rank=-1"),
    ],
)
def test_bad_options(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        GradProjCallback(**options, output_dir=tmp_path)


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    torchrun("tests.distributed.run_projecting_trainer", tmp_path)
    from hf_gradtools.ghost.gradproj.store import GradientStore

    store = GradientStore.open(tmp_path / "rows")
    assert store.complete
    recorders = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2)]
    merged = Recorder()
    merged.steps = [*recorders[0], *recorders[1]]
    mine = store.rows(range(len(store)))
    assert error(mine, reference(llama(), merged)) < 1e-5
    keys = list(zip(store.column("step"), store.sample_ids, strict=True))
    assert len(keys) == len(set(keys)) == 18
