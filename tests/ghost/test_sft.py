"""TRL's SFTTrainer, whose fused output head is never called, checkpointing and bf16 on by its defaults."""

from __future__ import annotations

import pytest
import torch

from tests.ghost.reference import errors, llama, rows, train
from tests.ghost.test_models import adapted


trl = pytest.importorskip("trl")
VAL = rows(5, seed=9)


def sft(**kwargs):
    """An SFTTrainer with the plain arguments of `reference.train`."""
    args = kwargs.pop("args")
    config = trl.SFTConfig(
        output_dir=args.output_dir, per_device_train_batch_size=3, max_steps=3, learning_rate=1e-2, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, seed=1, bf16=args.bf16, max_length=None,
        gradient_accumulation_steps=args.gradient_accumulation_steps, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=True, optim=args.optim,
    )  # fmt: skip
    return trl.SFTTrainer(args=config, processing_class=tiny_tokenizer(), **kwargs)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(67)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), pad_token="t0", eos_token="t1"
    )


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("steps", [1, 2], ids=["plain", "accumulation"])
def test_fused_head_is_scored(tie, steps, tmp_path):
    model = llama(tie=tie)
    args = {"gradient_accumulation_steps": steps, "bf16": False}
    callback, recorder, _ = train(model, unpadded(14), VAL, tmp_path, args=args, trainer=sft)
    assert errors(callback, recorder, with_counts(recorder, model), VAL) < 1e-5
    assert max(callback.dataset["residual"]) < 1e-5


def unpadded(n):
    """Rows of one length, as SFT's collator pads by itself."""
    return rows(n, length=(9, 9)).remove_columns("attention_mask")


def with_counts(recorder, model):
    """SFT keeps the normaliser to itself: it is the number of targets of the step."""
    for step in recorder.steps:
        total = sum((batch["labels"][:, 1:] != -100).sum() for batch, _ in step["batches"])
        for batch, _ in step["batches"]:
            batch["num_items_in_batch"] = total
    return model


def test_lora_under_sft(tmp_path):
    model = adapted(llama(), target_modules="all-linear")
    callback, recorder, _ = train(model, unpadded(14), VAL, tmp_path, trainer=sft, args={"bf16": False})
    assert errors(callback, recorder, with_counts(recorder, model), VAL) < 1e-5


def test_bf16_and_sample_losses(tmp_path):
    model = llama()
    args = {"bf16": True}
    callback, recorder, _ = train(model, unpadded(14), VAL, tmp_path, trainer=sft, args=args, sample_losses=True)
    assert errors(callback, recorder, with_counts(recorder, model), VAL) < 1e-2
    data = callback.dataset[:]
    assert max(data["residual"]) < 1e-3
    weighted = torch.tensor(data["sample_loss"][:3]) @ torch.tensor(data["num_tokens"][:3]).float()
    assert float(weighted) / sum(data["num_tokens"][:3]) == pytest.approx(data["train_loss"][0], rel=1e-3)
