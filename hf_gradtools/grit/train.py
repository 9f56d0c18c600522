"""The workflow of `hf-gradtools grit train`: a causal LM, its data, a [`GritTrainer`] with a GRIT adapter.

```python
run = prepare_run(GritTrainConfig(model="HuggingFaceTB/SmolLM2-135M", dataset="train.jsonl", output_dir="out"))
metrics = run.train()
metrics["eval_loss_before"], metrics["eval_loss_after"], metrics["reduction"]
```
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from transformers import Seq2SeqTrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from hf_gradtools.core.store import write_json_atomically
from hf_gradtools.grit.checks import find_tuner
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.train_config import GritTrainConfig
from hf_gradtools.grit.trainer import GritTrainer
from hf_gradtools.workflow.causal_lm import (
    check_bitsandbytes,
    load_model,
    load_quantized_model,
    load_tokenizer,
    make_collator,
)
from hf_gradtools.workflow.data import SAMPLE_ID
from hf_gradtools.workflow.run import (
    WriteOptions,
    check_same_options,
    load_data,
    tokenize,
    trained_share,
    training_arguments,
)
from hf_gradtools.workflow.tokenizing import RowFormat


__all__ = ["GritRun", "prepare_run"]

METRICS = "metrics.json"  # in the folder of a run
HELD_OUT = "validation"


@dataclass
class GritRun:
    """A run that is ready to start.

    Attributes:
        config: its options.
        trainer: holds model, tokenizer and data.
        held_out: validation rows before they were tokenized.
        row_format: the columns that the model learns from.
    """

    config: GritTrainConfig
    trainer: GritTrainer
    held_out: Dataset
    row_format: RowFormat

    def train(self) -> dict[str, float]:
        """Trains, and leaves the adapter, its model card, `grit_ranks.json` and `metrics.json` in the output
        folder.

        Returns:
            `eval_loss_before` and `eval_loss_after`, on the validation rows; `steps`, `seconds`; and the adapter's
            `parameters`, `base_parameters`, `reduction`.
        """
        folder, start = self.config.output_dir, time.perf_counter()
        self.trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if self.config.resume else None)
        seconds = time.perf_counter() - start
        self.trainer.save_model()
        after = self.trainer.evaluate()["eval_loss"]
        self.trainer.save_state()
        state, tuner = self.trainer.state, find_tuner(self.trainer.model)
        report = tuner.rank_report(tuner.active_adapters[0])
        metrics = {
            "eval_loss_before": next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry),
            "eval_loss_after": after,
            "steps": state.global_step,
            "seconds": seconds,
            **{name: report[name] for name in ("parameters", "base_parameters", "reduction")},
        }
        if self.trainer.is_world_process_zero():
            write_json_atomically(Path(folder) / METRICS, metrics)
        self.trainer.create_model_card()
        return metrics

    def summary(self) -> str:
        """One line on each of model, training rows and validation rows."""
        how = f"{'4-bit, ' * self.config.qlora}GRIT of rank {self.config.rank}"
        train, validation = self.trainer.train_dataset, self.trainer.eval_dataset
        return (
            f"model       {self.config.model}: {how}, {trained_share(self.trainer.model)}\n"
            f"training    {len(train):,} rows of {self.config.dataset}: {self.row_format}\n"
            f"validation  {len(validation):,} rows"
        )


def prepare_run(config: GritTrainConfig, format_row: Callable[[dict[str, Any]], Any] | None = None) -> GritRun:
    """Loads model and data. Writes no file, so that a mistake in the options leaves nothing behind.

    Args:
        config: the options.
        format_row: takes a row of the dataset, returns `{"prompt": str, "completion": str}`; instead of the options
            that name columns.

    Raises:
        ValueError: an option does not fit the others, the data, the model, or what is in the output folder.
        ImportError: `qlora` needs bitsandbytes.
    """
    if config.qlora:
        check_bitsandbytes()
    adapter, arguments = _adapter_config(config), _training_arguments(config)
    _check_output_dir(config)
    _check_columns(config, format_row)
    tokenizer = load_tokenizer(config.model)
    train, validation = load_data(config, {HELD_OUT: config.val}, format_row)
    samples, row_format = tokenize(train, f"dataset={config.dataset!r}", tokenizer, config)
    scored, _ = tokenize(validation[HELD_OUT], f"val={config.val!r}", tokenizer, config)
    set_seed(config.seed)
    dtype = config.dtype or "auto"
    if config.qlora:
        model = load_quantized_model(config.model, dtype, arguments.device, config.gradient_checkpointing)
    else:
        model = load_model(config.model, dtype)
    trainer = GritTrainer(
        get_peft_model(model, adapter),
        arguments,
        data_collator=make_collator(tokenizer),
        train_dataset=samples.remove_columns([SAMPLE_ID, "text"]),
        eval_dataset=scored.remove_columns([SAMPLE_ID, "text"]),
        processing_class=tokenizer,
    )
    trainer.add_callback(WriteOptions(config))
    return GritRun(config, trainer, validation[HELD_OUT], row_format)


def _adapter_config(config: GritTrainConfig) -> GritConfig:
    """The adapter's config; what is None is left to the preset."""
    named = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    options = {
        "r": config.rank,
        "lora_alpha": config.alpha or 2 * config.rank,
        "target_modules": "all-linear" if named == ["all-linear"] else named,
        "task_type": "CAUSAL_LM",
    }
    for name in ("rank_adaptation_threshold", "preconditioner", "reprojection"):
        if (value := getattr(config, name)) is not None:
            options[name] = None if value == "none" else value
    return GritConfig(**options) if config.preset is None else GritConfig.preset(config.preset, **options)


def _training_arguments(config: GritTrainConfig) -> Seq2SeqTrainingArguments:
    schedules = [kind.value for kind in SchedulerType]
    if config.lr_scheduler_type not in schedules:
        raise ValueError(
            f"lr_scheduler_type={config.lr_scheduler_type!r} is unknown. Pass one of {', '.join(schedules)}."
        )
    return training_arguments(
        Seq2SeqTrainingArguments,
        config,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        eval_on_start=not config.resume,  # a resumed run has it in its log
        logging_steps=config.logging_steps,
        **(_checkpointing() if config.gradient_checkpointing else {}),
    )


def _checkpointing() -> dict[str, Any]:
    """Non-reentrant checkpointing, which frozen embeddings do not disturb, by transformers' old or new name."""
    renamed = "activation_checkpointing" in Seq2SeqTrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _check_output_dir(config: GritTrainConfig) -> None:
    checkpoint = get_last_checkpoint(config.output_dir) if Path(config.output_dir).is_dir() else None
    if config.resume:
        check_same_options(config)
        if checkpoint is None:
            raise ValueError(
                f"output_dir={config.output_dir!r} holds no checkpoint to continue from. "
                "Start anew without resume=True, and with fewer save_steps if runs are interrupted."
            )
    elif checkpoint is not None:
        raise ValueError(
            f"output_dir={config.output_dir!r} holds the checkpoints of an earlier run. "
            "Continue it by resume=True, or pass another folder."
        )


def _check_columns(config: GritTrainConfig, format_row: object) -> None:
    named = [name for name in ("text_column", "prompt_column", "response_column") if getattr(config, name)]
    if format_row is not None and named:
        raise ValueError(f"{named[0]}={getattr(config, named[0])!r} is not read beside format_row; leave one out.")
