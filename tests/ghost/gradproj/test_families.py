"""A sample's gradient is that of its own mean loss in every family of models, in batches, alone, and under Trainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hf_gradtools import GhostDotProdCallback, GradProjCallback, GradProjector
from hf_gradtools.ghost.coverage import UncoveredGradientError
from tests.ghost.gradproj.reference_projection import error
from tests.ghost.reference import VOCAB, gpt2, llama, rows
from tests.ghost.test_models import SMALL
from tests.ghost.test_sft import tiny_tokenizer


OPTIONS = {"proj_rank_total": 64, "rank": (5, 6), "dtype": "float32"}
BERT = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TOKENS = rows(8).remove_columns("labels")


def labelled(make):
    return Dataset.from_list([{**row, **make(i, row)} for i, row in enumerate(TOKENS)])


def token_labels(i, row):
    return {
        "labels": [
            t % 3 if m and t % 4 else -100 for t, m in zip(row["input_ids"], row["attention_mask"], strict=True)
        ]
    }


FAMILIES = {
    "classes": (
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
        lambda i, r: {"labels": i % 3},
    ),
    "multi_label": (
        lambda: BertForSequenceClassification(
            BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")
        ),
        lambda i, r: {"labels": [float(i % 2), 1.0, 0.0]},
    ),
    "regression": (
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=1)),
        lambda i, r: {"labels": -100.0 if i == 3 else i / 3},
    ),
    "tokens": (lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=3)), token_labels),
    "masked": (
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        lambda i, r: {"labels": [t if j < 1 + i or j == 5 else -100 for j, t in enumerate(r["input_ids"])]},
    ),
    "spans": (
        lambda: BertForQuestionAnswering(BertConfig(**BERT)),
        lambda i, r: {"start_positions": i % 3, "end_positions": i % 3 + 2},
    ),
    "next_sentence": (lambda: BertForNextSentencePrediction(BertConfig(**BERT)), lambda i, r: {"labels": i % 2}),
    "llama": (llama, lambda i, r: {"labels": r["input_ids"]}),
    "gpt2": (gpt2, lambda i, r: {"labels": [-100] * (i % 4) + r["input_ids"][i % 4 :]}),
    "compiled": (lambda: torch.compile(llama(), backend="eager"), lambda i, r: {"labels": r["input_ids"]}),
    "seq2seq": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                     decoder_start_token_id=0, pad_token_id=0)
        ),
        lambda i, r: {"labels": [*r["input_ids"][: 4 + i % 5], *[-100] * (5 - i % 5)]},
    ),
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(vocab_size=VOCAB, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
                       dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
                       forced_eos_token_id=None)
        ),
        lambda i, r: {"labels": [*r["input_ids"][: 4 + i % 5], *[-100] * (5 - i % 5)]},
    ),
    "experts_with_a_balancing_loss": (
        lambda: MixtralForCausalLM(
            MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1, output_router_logits=True)
        ),
        lambda i, r: {"labels": r["input_ids"]},
    ),
}  # fmt: skip


def family(name):
    torch.manual_seed(0)
    make, label = FAMILIES[name]
    return make(), labelled(label)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch_are_rows_alone(name):
    model, data = family(name)
    alone = GradProjector(model, **OPTIONS, on_uncovered="ignore").gradients(data, batch_size=1)
    together = GradProjector(model, **OPTIONS).gradients(data, batch_size=3)
    assert error(together, alone) < 1e-5


@pytest.mark.parametrize("name", ["bart", "llama", "gpt2", "classes"])
def test_every_parameter_of_a_model(name):
    model, data = family(name)
    exact = {"layers": None, "rank": (None, None), "stages": 1}
    alone = GradProjector(model, **exact).gradients(data, batch_size=1)
    together = GradProjector(model, **exact).gradients(data, batch_size=3)
    assert error(together, alone) < 1e-5


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("compiled", "experts_with_a_balancing_loss")])
@pytest.mark.parametrize("steps", [1, 2])
def test_rows_under_trainer_are_rows_alone(name, steps, tmp_path):
    """Many models take `num_items_in_batch` and leave it; then Trainer scales nothing."""
    model, data = family(name)
    expected = GradProjector(model, **OPTIONS, on_uncovered="ignore").gradients(data, batch_size=1)
    callback = GradProjCallback(output_dir=tmp_path / "rows", **OPTIONS)
    args = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=steps, learning_rate=0.0,
        num_train_epochs=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    store = callback.store
    assert sorted(store.sample_ids) == list(range(8))
    assert error(store.rows(range(8)), expected[store.sample_ids]) < 1e-5


@pytest.mark.parametrize("name", ["classes", "seq2seq", "llama"])
def test_dot_products_on_the_samples_own_scale_too(name, tmp_path):
    model, data = family(name)
    val = data.select([0, 1])
    exact = (
        GradProjector(model, layers=None, rank=(None, None), stages=1, on_uncovered="ignore")
        if name != "seq2seq"
        else None
    )
    args = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.0,
        num_train_epochs=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    layers = "all-linear" if name == "seq2seq" else None
    exact = GradProjector(model, layers=layers, rank=(None, None), stages=1, on_uncovered="ignore")
    callback = GhostDotProdCallback(val, output_dir=str(tmp_path / "ghost"), scale="sample_mean", val_batch_size=None,
                                    layers=layers)  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    counts = torch.tensor([1.0, 1.0])
    if name != "classes":
        shifted = int(name == "llama")
        counts = torch.tensor([sum(x != -100 for x in row["labels"][shifted:]) for row in val]).float()
    target = (exact.gradients(val, batch_size=1) * counts[:, None]).sum(0) / counts.sum()
    expected = exact.gradients(data, batch_size=1) @ target
    found = callback.dataset.with_format("torch")[:]
    assert error(found["dot_product"], expected[found["sample_id"]].double()) < 1e-5


def test_a_loss_that_is_no_mean_over_its_labels_is_noticed():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, attention_mask, labels):
            loss = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)["loss"]
            return {"loss": loss * len(labels)}

    data = rows(6)
    with pytest.raises(UncoveredGradientError, match="rows of a batch have other gradients than alone"):
        GradProjector(Wrapped(), **OPTIONS).gradients(data, batch_size=3)
    GradProjector(Wrapped(), **OPTIONS).gradients(data, batch_size=1)  # needs no factor


def test_a_collator_that_masks_at_random_leaves_training_alone_and_draws_the_same_again(tmp_path):
    collator = DataCollatorForLanguageModeling(masking_tokenizer(), mlm_probability=0.4)
    data = [{"input_ids": row["input_ids"]} for row in rows(8, length=(9, 9))]
    model, _ = family("masked")
    stores = [
        GradProjector(model, **OPTIONS).project(Dataset.from_list(data), collator, tmp_path / name) for name in "ab"
    ]
    assert torch.equal(*(store.rows(range(8)) for store in stores))

    def weights(callbacks):
        twin, _ = family("masked")
        args = TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, report_to="none",
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(twin, args, collator, Dataset.from_list(data), callbacks=callbacks).train()
        return torch.cat([p.detach().flatten() for p in twin.parameters()])

    plain = weights([])
    assert torch.equal(plain, weights([GradProjCallback(output_dir=tmp_path / "c", **OPTIONS)]))


def masking_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "t2"
    return tokenizer
