"""TRL's SFTTrainer with `peft_config=GritConfig(...)` and the callback: fused head, checkpointing, bf16 by default."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_gradtools import GritCallback, GritConfig
from tests.ghost.test_sft import tiny_tokenizer
from tests.grit.reference import adapted, base_model, brute_force, gap


trl = pytest.importorskip("trl")
CONFIG = {
    "r": 6,
    "target_modules": "all-linear",
    "min_lora_rank": 1,
    "kfac_min_samples": 1,
    "task_type": "CAUSAL_LM",
    "reprojection_warmup_steps": 0,
}


def sft(dataset, path, config, callback, **options):
    args = trl.SFTConfig(
        output_dir=str(path), report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no",
        **{"per_device_train_batch_size": 4, "max_steps": 1, "bf16": False, "max_length": None, "seed": 0, **options},
    )  # fmt: skip
    return trl.SFTTrainer(
        model=base_model(), args=args, train_dataset=dataset, processing_class=tiny_tokenizer(), peft_config=config,
        callbacks=[callback],
    )  # fmt: skip


def rows_of(*lengths):
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_list(
        [{"input_ids": torch.randint(2, 40, (n,), generator=generator).tolist()} for n in lengths]
    )


def test_padding_is_not_counted(tmp_path):
    """Its head is fused, so the forward that everything else hooks may not be called: the mask must arrive even so."""
    callback = GritCallback()
    trainer = sft(rows_of(9, 4, 6, 3), tmp_path, GritConfig(**CONFIG, reprojection=None), callback)
    trainer.train()
    assert {fisher.samples for fisher in callback.controller.fishers.values()} == {22.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    ],
)
def test_factors_equal_brute_force(options, tmp_path):
    """The loss is a mean over all labels of the step, which the fused head's forward is not told. B is zero at the
    first step, so it is set here."""
    lengths = (9, 4, 6, 3)
    callback = GritCallback()
    trainer = sft(
        rows_of(*lengths), tmp_path, GritConfig(**CONFIG, reprojection=None), callback, learning_rate=0.0,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    for layer in trainer.model.base_model.layers():
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(1))
    rows = rows_of(*lengths)["input_ids"]
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    twin = adapted(r=6, lora_alpha=trainer.model.peft_config["default"].lora_alpha)  # TRL patches its model's forward
    twin.load_state_dict(trainer.model.state_dict())
    expected = {x.name: brute_force(twin, x, inputs) for x in twin.base_model.layers()}
    trainer.train()
    for name, fisher in callback.controller.fishers.items():
        factors, tokens = expected[name]
        assert fisher.samples == tokens
        assert gap(fisher.factors[0], factors[0]) < 1e-4
        assert gap(fisher.factors[1], factors[1]) < 1e-4


def test_defaults_of_sft(tmp_path):
    """bf16, checkpointing, packing and prompt-completion data; ranks change, the loss falls."""
    rows = [{"prompt": f"t{2 + i % 5} t{9 + i % 3}", "completion": f" t{20 + i % 5} t{30 + i % 3}"} for i in range(40)]
    callback = GritCallback()
    config = GritConfig(**CONFIG, reprojection_freq=10, rank_adaptation_threshold=0.95)
    trainer = sft(
        Dataset.from_list(rows), tmp_path, config, callback, bf16=True, max_steps=25, learning_rate=1e-2,
        logging_steps=5, packing=True, max_length=32,
    )  # fmt: skip
    callback.set_trainer(trainer)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert min(trainer.model.base_model.ranks().values()) < 6
    assert any("grit/rank" in row for row in trainer.state.log_history)
