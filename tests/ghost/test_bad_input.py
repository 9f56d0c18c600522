"""What users get wrong: the error names the argument, the value and the remedy, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_gradtools import GhostDotProdCallback, GhostDotProdConfig
from tests.ghost.reference import as_batch, gpt2, llama, rows, train


VAL = rows(5, seed=9)


def clean(model):
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


def test_iterable_dataset_without_ids(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=r"iterable and its rows have no column 'sample_id'.*with_indices=True"):
        train(model, rows(9).to_iterable_dataset(), VAL, tmp_path)
    assert clean(model)


def test_iterable_dataset_with_ids(tmp_path):
    data = rows(9).add_column("sample_id", [f"row-{i}" for i in range(9)]).to_iterable_dataset()
    callback, _, _ = train(llama(), data, VAL, tmp_path, args={"remove_unused_columns": False})
    assert sorted(callback.dataset["sample_id"]) == [f"row-{i}" for i in range(9)]


@pytest.mark.parametrize("val", [rows(0), {"a": rows(2), "b": rows(0)}])
def test_empty_validation_set(val):
    with pytest.raises(ValueError, match=r"has 0 rows; GhostDotProdCallback needs at least 1 with 'labels'"):
        GhostDotProdCallback(val)


def test_validation_set_without_labels(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=r"validation set 'validation' has columns .*lacks \['labels'\]"):
        train(model, rows(9), VAL.remove_columns("labels"), tmp_path)
    assert clean(model)


def test_validation_set_whose_labels_are_all_ignored(tmp_path):
    masked = VAL.map(lambda row: {"labels": [-100] * len(row["labels"])})
    model = llama()
    with pytest.raises(ValueError, match="no label that counts"):
        train(model, rows(9), masked, tmp_path)
    model._forward_pre_hooks.popitem()  # the test's own recorder
    assert clean(model)


def test_collator_that_makes_no_labels(tmp_path):
    def collate(items):
        return {k: v for k, v in as_batch(Dataset.from_list(items)).items() if k != "labels"}

    with pytest.raises(ValueError, match=r"gives batches without 'labels'.*data_collator"):
        train(llama(), rows(9), VAL, tmp_path, data_collator=collate)


class Poisoned(torch.utils.data.Dataset):
    """Row 4 makes the loss NaN: the model multiplies its embedding by what the row says."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.data[i]


def poisoned_model():
    model = llama()

    def poison(module, args, output):
        return output * torch.where((args[0] == 66).any(-1, keepdim=True), float("nan"), 1.0)[..., None]

    model.model.embed_tokens.register_forward_hook(poison)
    return model


def poisoned_rows():
    data = rows(9, length=(6, 14)).to_list()
    for i, row in enumerate(data):
        row["input_ids"] = [66 if i == 4 else min(x, 65) for x in row["input_ids"]]
    return Dataset.from_list(data)


def clean_val():
    return VAL.map(lambda row: {"input_ids": [min(x, 65) for x in row["input_ids"]]})


def test_nan_loss_stops_and_names_the_sample(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d: the gradients of samples 4 are not finite"):
        train(poisoned_model(), poisoned_rows(), clean_val(), tmp_path)


def test_nan_loss_can_be_skipped(tmp_path, caplog):
    args = {"learning_rate": 0.0, "optim": "sgd", "max_grad_norm": 0.0}
    callback, _, _ = train(poisoned_model(), poisoned_rows(), clean_val(), tmp_path, args=args, on_nonfinite="skip")
    first = callback.dataset.filter(lambda row: row["step"] == 1)
    assert 4 not in callback.dataset["sample_id"]
    assert "samples 4 are not finite" in caplog.text
    assert len(first) >= 2


def test_unknown_layer_pattern_lists_near_matches(tmp_path):
    with pytest.raises(ValueError, match=r"layers='q_porj' matches no module.*near matches: .*q_proj"):
        train(llama(), rows(9), VAL, tmp_path, layers="q_porj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, r"method='magic' is unknown; choose one of 'auto'"),
        ({"scale": "mean"}, r"scale='mean' is unknown"),
        ({"every_steps": 0}, r"every_steps=0 must be at least 1"),
        ({"val_batch_size": 0}, r"val_batch_size=0 must be at least 1"),
        ({"method": "gram", "optimizer_aware": True}, r"method='gram' scores against unscaled"),
        ({"optimizer_aware": "exact", "second_order": True}, r"does not combine"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        GhostDotProdConfig(**options)
    with pytest.raises(TypeError, match="evry_steps"):
        GhostDotProdConfig(evry_steps=2)


def test_optimizer_without_a_known_update(tmp_path):
    with pytest.raises(ValueError, match=r"torch's SGD, Adam and AdamW, not for Adafactor.*adamw_torch"):
        train(llama(), rows(9), VAL, tmp_path, optimizer_aware=True, args={"optim": "adafactor"})


def test_loss_computed_without_the_batchs_ids(tmp_path):
    from transformers import Trainer

    class Selective(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return super().compute_loss(model, {k: inputs[k] for k in ("input_ids", "labels")}, **kwargs)

    model = llama()
    with pytest.raises(RuntimeError, match="without its sample ids"):
        train(model, rows(9), VAL, tmp_path, trainer=Selective)
    model._forward_pre_hooks.popitem()  # the test's own recorder
    assert clean(model)


def test_no_validation_set_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"no val_dataset; pass val_dataset=.*set_trainer"):
        train(llama(), rows(9), None, tmp_path)


def test_nothing_trainable(tmp_path):
    model = gpt2().requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    with pytest.raises(ValueError, match="matches no module with trainable parameters"):
        train(model, rows(9), VAL, tmp_path, layers="mlp")
