"""Kinds of models: adapters, quantised bases, experts, shared modules, packed rows, classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

from hf_gradtools import GhostDotProd
from tests.ghost.reference import (
    VOCAB,
    as_batch,
    errors,
    gpt2,
    llama,
    per_sample_gradients,
    perturbed,
    reference_step,
    rows,
    sample_losses,
    train,
    validation_gradient,
)


VAL = rows(5, seed=9)
SMALL = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip


def adapted(model, **kwargs):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, **kwargs))
    return perturbed(model)


@pytest.mark.parametrize("method", ["auto", "takeover", "gram", "contraction"])
@pytest.mark.parametrize("base", [gpt2, llama])
def test_lora(base, method, tmp_path):
    model = adapted(base(), target_modules=["c_attn", "c_fc"] if base is gpt2 else ["q_proj", "v_proj", "up_proj"])
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, method=method)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert max(callback.dataset["residual"]) < 1e-5
    assert all("lora_" in name for name in layer_names(callback))


def layer_names(callback):
    from hf_gradtools.core.store import read_manifest

    return read_manifest(callback.config.output_dir)["identity"]["layers"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=["dora", "modules_to_save", "embedding", "bias"],
)
def test_adapter_kinds(kwargs, tmp_path):
    model = adapted(llama(tie=False, attention_bias=True), **kwargs)
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert max(callback.dataset["residual"]) < 1e-5


def test_lora_with_checkpointing_and_accumulation(tmp_path):
    model = adapted(llama(), target_modules="all-linear")
    args = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    callback, recorder, _ = train(model, rows(14), VAL, tmp_path, args=args, grad_norms=True)
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert errors(callback, recorder, model, VAL, column="grad_norm") < 1e-5


@pytest.mark.bnb
@pytest.mark.parametrize("method", ["auto", "contraction"])
def test_lora_on_nf4_with_an_evaluation_in_between(method, tmp_path):
    """The reference runs on the dequantised weights, which an evaluation's repacking cannot touch."""
    pytest.importorskip("bitsandbytes")
    dense = LlamaForCausalLM(type(llama().config)(**{**SMALL, "hidden_size": 64, "intermediate_size": 64}))
    dense.save_pretrained(tmp_path / "dense")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    twin = dequantized(base, dense)
    model = adapted(base, target_modules=["q_proj", "v_proj", "down_proj"])
    args = {"eval_strategy": "steps", "eval_steps": 1}
    callback, recorder, _ = train(
        model, rows(9), VAL, tmp_path, args=args, method=method, trainer=lambda **kw: Trainer(eval_dataset=VAL, **kw)
    )
    twin = adapted(twin, target_modules=["q_proj", "v_proj", "down_proj"])
    for step in recorder.steps:
        adapters = {k: v for k, v in step["weights"].items() if "lora_" in k}
        step["weights"] = {**twin.state_dict(), **adapters}
    assert errors(callback, recorder, twin, VAL, dtype=torch.float32) < 1e-5
    assert max(callback.dataset["residual"]) < 1e-4


def dequantized(model, dense):
    """A dense model with exactly the weights that the 4-bit layers stand for."""
    import bitsandbytes as bnb

    twin = copy.deepcopy(dense)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            twin.get_submodule(name).weight.data = weight.to(torch.float32).clone()
    return twin


@pytest.mark.parametrize("method", ["auto", "contraction"])
def test_gemmas_scaled_embedding_and_shifted_norm(method, tmp_path):
    model = perturbed(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=12, pad_token_id=0)))
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, method=method, grad_norms=True)
    assert errors(callback, recorder, model, VAL, dtype=torch.float32) < 1e-5
    assert errors(callback, recorder, model, VAL, column="grad_norm", dtype=torch.float32) < 1e-5


def test_experts_some_without_a_token(tmp_path):
    torch.manual_seed(0)
    model = perturbed(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=16, num_experts_per_tok=1)))
    callback, recorder, _ = train(
        model, rows(9, length=(3, 5)), VAL, tmp_path, args={"per_device_train_batch_size": 1}
    )
    assert errors(callback, recorder, model, VAL, dtype=torch.float32) < 5e-5
    assert max(callback.dataset["residual"]) < 1e-4


def test_experts_under_bf16_autocast(tmp_path):
    """Layers without a closed form are replayed in the precision that they ran in."""
    torch.manual_seed(0)
    model = perturbed(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)))
    callback, _, _ = train(model, rows(9), VAL, tmp_path, args={"bf16": True})
    assert max(callback.dataset["residual"]) < 1e-2


def test_module_called_several_times(tmp_path):
    """ALBERT runs one block for all its layers."""
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0, classifier_dropout_prob=0,
        num_labels=3,
    )  # fmt: skip
    model = perturbed(AlbertForSequenceClassification(config)).double()
    check_classifier(model, tmp_path)


def check_classifier(model, tmp_path):
    g = torch.Generator().manual_seed(3)
    batch = {
        "input_ids": torch.randint(1, VOCAB, (6, 9), generator=g),
        "labels": torch.randint(0, 3, (6,), generator=g),
    }
    val = {"input_ids": torch.randint(1, VOCAB, (4, 9), generator=g), "labels": torch.randint(0, 3, (4,), generator=g)}
    for method in ("auto", "takeover", "contraction"):
        model.train()
        model.zero_grad()
        with GhostDotProd(model, method=method, grad_norms=True) as engine:
            engine.validate([val])
            model(**batch).loss.backward()
            scores = engine.scores()
        expected, norms = naive(model, batch, val)
        torch.testing.assert_close(scores.dots[0], expected.double(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(scores.sq_norms.sqrt(), norms.double(), rtol=1e-6, atol=1e-9)
        assert scores.residual < 1e-7


def naive(model, batch, val):
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(inputs):
        loss = nn.functional.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    model.eval()
    target = gradients(val)
    dots, norms = [], []
    for i in range(len(batch["labels"])):
        grads = gradients({k: v[i : i + 1] for k, v in batch.items()})
        pairs = [(g / len(batch["labels"]), t) for g, t in zip(grads, target, strict=True) if g is not None]
        dots.append(sum((g * t).sum() for g, t in pairs if t is not None))
        norms.append(sum(g.square().sum() for g, _ in pairs).sqrt())
    return torch.stack(dots).detach(), torch.stack(norms).detach()


def test_packed_rows_are_scored_by_document(tmp_path):
    """Flattened batches: the values equal those of the same rows unpacked, and ids find their documents."""
    data = Dataset.from_list([{"input_ids": r["input_ids"][: sum(r["attention_mask"])]} for r in rows(9)])
    model = llama()
    callback, recorder, _ = train(
        model, data, VAL, tmp_path, data_collator=lambda r: as_batch(Dataset.from_list(r)), per_token=True,
        trainer=lambda **kw: Trainer(data_collator=DataCollatorWithFlattening(return_seq_idx=False), **kw),
    )  # fmt: skip
    stored = callback.dataset[:]
    assert max(stored["residual"]) < 1e-5
    for n, step in enumerate(recorder.steps, start=1):
        mine = {
            i: d for i, s, d in zip(stored["sample_id"], stored["step"], stored["dot_product"], strict=True) if s == n
        }
        expected = unpacked(model, step, data, list(mine))
        torch.testing.assert_close(torch.tensor(list(mine.values())).double(), expected, rtol=1e-4, atol=1e-7)
    tokens = [sum(t) for t in stored["token_dot_products"]]
    assert tokens == pytest.approx(stored["dot_product"], rel=1e-4, abs=1e-7)


def unpacked(model, step, data, ids):
    model = copy.deepcopy(model)
    model.load_state_dict(step["weights"])
    model = model.double()
    target = validation_gradient(model, as_batch(VAL))
    count = step["batches"][0][0]["num_items_in_batch"]
    dots = []
    for i in ids:
        tokens = torch.tensor([data[i]["input_ids"]])
        losses = sample_losses(model, {"input_ids": tokens, "labels": tokens}, count)
        (grads,) = per_sample_gradients(model, losses)
        dots.append(sum((g * t).sum() for g, t in zip(grads, target, strict=True)))
    return torch.stack(dots)


def test_two_callbacks_at_once(tmp_path):
    from hf_gradtools import GhostDotProdCallback

    model, other_val = llama(), rows(4, seed=5)
    second = GhostDotProdCallback(other_val, output_dir=str(tmp_path / "second"), val_batch_size=None)
    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, callbacks=[second])
    assert errors(callback, recorder, model, VAL) < 1e-5
    assert errors(second, recorder, model, other_val) < 1e-5


def test_several_validation_sets_are_scored_at_once(tmp_path):
    model, sets = gpt2(), {"a": VAL, "b": rows(3, seed=4)}
    callback, recorder, _ = train(model, rows(9), sets, tmp_path, per_layer=True)
    for name, val in sets.items():
        assert errors(callback, recorder, model, val, column=f"dot_product/{name}") < 1e-5
    data = callback.dataset[:]
    assert [sum(x) for x in data["layer_dot_products/b"]] == pytest.approx(data["dot_product/b"], rel=1e-4, abs=1e-7)


def test_pairwise_against_each_validation_sample(tmp_path):
    model = llama()
    callback, recorder, _ = train(model, rows(6), VAL, tmp_path, pairwise=True, args={"max_steps": 1})
    pairs = torch.tensor(callback.dataset["pairwise_dot_products"][:]).double()
    counts = torch.tensor([sum(x != -100 for x in r["labels"][1:]) for r in VAL])
    for j in range(len(VAL)):
        expected, _ = reference_step(model, recorder.steps[0], as_batch(VAL.select([j])))
        torch.testing.assert_close(pairs[:, j], expected * counts[j] / counts.sum(), rtol=1e-4, atol=1e-8)
    assert pairs.sum(1).tolist() == pytest.approx(callback.dataset["dot_product"][:], rel=1e-4)


def test_seq2seq_trainer_with_lora(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=VOCAB, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = adapted(T5ForConditionalGeneration(config), target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")

    def trainer(args, **kwargs):
        fields = {"per_device_train_batch_size": 3, "max_steps": 3, "report_to": "none", "use_cpu": True, "seed": 1}
        return Seq2SeqTrainer(
            args=Seq2SeqTrainingArguments(str(tmp_path / "out"), save_strategy="no", **fields), **kwargs
        )

    callback, recorder, _ = train(model, rows(9), VAL, tmp_path, trainer=trainer)
    data = callback.dataset.with_format("numpy")[:]
    assert data["residual"].max() < 1e-5
    for n, step in enumerate(recorder.steps, start=1):
        mine = torch.tensor(data["dot_product"][data["step"] == n]).double()
        torch.testing.assert_close(mine, seq2seq_dots(model, step), rtol=1e-4, atol=1e-7)


def seq2seq_dots(model, step):
    """One backward per row through the model's own loss, weighted by its share of the targets."""
    model = copy.deepcopy(model)
    model.load_state_dict(step["weights"])
    model = model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    (batch, _), val = step["batches"][0], as_batch(VAL)
    target = torch.autograd.grad(model(**val).loss, parameters)
    dots = []
    for i in range(len(batch["labels"])):
        row = {k: v[i : i + 1] for k, v in batch.items() if k in ("input_ids", "labels", "attention_mask")}
        share = (row["labels"] != -100).sum() / batch["num_items_in_batch"]
        grads = torch.autograd.grad(model(**row).loss * share, parameters)
        dots.append(sum((g * t).sum() for g, t in zip(grads, target, strict=True)))
    return torch.stack(dots)


def test_scaled_losses_of_fp16_training():
    """Values are of the loss before the scaler multiplied it."""
    model, batch, val = llama(), as_batch(rows(4)), as_batch(VAL)
    found = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        model.train()
        with GhostDotProd(model, shifts_labels=True, grad_norms=True) as engine:
            engine.loss_scale = lambda scale=scale: scale
            engine.validate([val])
            (model(**batch).loss * scale).backward()
            found.append(engine.scores())
    torch.testing.assert_close(found[0].dots, found[1].dots, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found[0].sq_norms, found[1].sq_norms, rtol=1e-4, atol=1e-8)
    assert found[1].residual < 1e-5
