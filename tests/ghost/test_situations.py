"""The callback in real Trainer runs, each against one backward pass per sample (float64 where not said otherwise)."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.ghost.reference import as_batch, errors, gpt2, llama, reference_step, rows, train


METHODS = ["auto", "takeover", "gram", "contraction"]
VAL = rows(5, seed=9)


def residual(callback):
    return max(callback.dataset["residual"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [gpt2, llama], ids=["conv1d_layernorm_tied", "linear_rmsnorm_tied"])
def test_every_parameter_is_scored(make, method, tmp_path):
    model = make()
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, method=method)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert residual(callback) < 1e-5


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize(
    "args",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 1},
        {"dataloader_num_workers": 2},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=["accumulation", "clipping", "checkpointing", "reentrant", "batch_of_one", "workers", "sgd"],
)
def test_training_arguments(args, method, tmp_path):
    model = llama()
    callback, recorder, _ = train(model, rows(26), VAL, tmp_path, args=args, method=method)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert residual(callback) < 1e-5


def test_short_last_accumulation_group_and_batch(tmp_path):
    model = gpt2()
    args = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2}
    callback, recorder, _ = train(model, rows(10), VAL, tmp_path, args=args)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert sorted(callback.dataset["sample_id"]) == sorted(2 * list(range(10)))


def test_left_padding(tmp_path):
    model, padded = gpt2(), rows(9, pad_left=True)
    callback, recorder, _ = train(model, padded, VAL, tmp_path)
    assert errors(callback, recorder, model, VAL) < 1e-5


def test_dropout_is_the_same_as_the_models_own(tmp_path):
    model = gpt2(dropout=0.2)
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path)
    assert errors(callback, recorder, model, VAL, dropout=True, dtype=torch.float32) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(method, tmp_path):
    model = llama()
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, args={"bf16": True}, method=method)
    assert errors(callback, recorder, model, VAL) < 1e-2
    assert residual(callback) < (1e-4 if method in ("auto", "takeover") else 1e-3)


def test_all_masked_sample_has_value_zero(tmp_path):
    data = rows(6).to_list()
    data[2]["labels"] = [-100] * len(data[2]["labels"])
    model = llama()
    callback, recorder, _ = train(model, type(VAL).from_list(data), VAL, tmp_path, args={"max_steps": 2})
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert [
        d for i, d in zip(callback.dataset["sample_id"], callback.dataset["dot_product"], strict=True) if i == 2
    ] == [0.0]


def test_frozen_parameters_stay_frozen_and_unscored(tmp_path):
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path)
    assert not model.transformer.wte.weight.requires_grad
    assert errors(callback, recorder, model, VAL) < 1e-5


def test_evaluation_in_the_middle(tmp_path):
    model = gpt2()
    args = {"eval_strategy": "steps", "eval_steps": 1}

    def with_eval(**kwargs):
        from transformers import Trainer

        return Trainer(eval_dataset=VAL, **kwargs)

    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, args=args, trainer=with_eval)
    assert errors(callback, recorder, model, VAL) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_norms_of_tied_weights_include_cross_terms(make, method, tmp_path):
    model = make()
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, method=method, grad_norms=True)
    assert errors(callback, recorder, model, VAL, column="grad_norm") < 1e-5
    data = callback.dataset[:]
    assert max(abs(c) for c in data["cosine"]) <= 1


def test_values_add_up_to_the_gradients_product(tmp_path):
    """Σ_i s_i = ⟨unclipped accumulated gradient, G⟩, the gradient taken from a plain backward."""
    model = llama()
    args = {"gradient_accumulation_steps": 4, "max_grad_norm": 1e-2, "max_steps": 1}
    callback, recorder, _ = train(model, rows(12), VAL, tmp_path, args=args)
    dots, _ = reference_step(model, recorder.steps[0], as_batch(VAL))
    assert abs(sum(callback.dataset["dot_product"]) - float(dots.sum())) < 1e-5 * float(dots.abs().sum())


@pytest.mark.parametrize(("method", "equal"), [("gram", True), ("contraction", True), ("auto", False)])
@pytest.mark.parametrize("make", [lambda: gpt2(dropout=0.1), llama], ids=["gpt2_dropout", "llama"])
def test_training_is_left_alone(make, method, equal, tmp_path):
    from transformers import Trainer, TrainingArguments

    scored, plain = make(), make()
    train(scored, rows(9), VAL, tmp_path, method=method, grad_norms=True, args={"max_steps": 6})
    args = TrainingArguments(
        str(tmp_path / "plain"), per_device_train_batch_size=3, max_steps=6, learning_rate=1e-2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip
    Trainer(plain, args, train_dataset=rows(9)).train()
    for a, b in zip(scored.parameters(), plain.parameters(), strict=True):
        if equal:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_on_the_model(tmp_path):
    model = llama()
    before = {name: (sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules()}
    _, _, trainer = train(model, rows(9), VAL, tmp_path)
    after = {name: (sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules() if name}
    assert after == {name: value for name, value in before.items() if name}
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert trainer.get_train_dataloader().base_dataloader.dataset[0].keys() == {
        "input_ids",
        "labels",
        "attention_mask",
    }


def test_encoder_decoder_with_lora_free_layers(tmp_path):
    """T5's position bias is computed once for all rows: it must be refused, and the rest is exact."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=67, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="relative_attention_bias"):
        train(model, rows(6), VAL, tmp_path / "all")
    callback, _, _ = train(
        model, rows(6), VAL, tmp_path / "some", layers=["layer_norm", r"\.(q|k|v|o|wi|wo)$", "shared"]
    )
    assert residual(callback) < 1e-5
