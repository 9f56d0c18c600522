"""The workflow of `hf-gradtools ghost train`: a causal LM, its data, a `Trainer` that scores every training sample.

```python
run = prepare_run(GhostTrainConfig(model="HuggingFaceTB/SmolLM2-135M", dataset="train.jsonl", output_dir="out"))
stored = run.train()
stored.write_report()
stored.values()["validation"].most_harmful(10)
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_gradtools.core.store import write_json_atomically
from hf_gradtools.ghost.callback import GhostDotProdCallback
from hf_gradtools.ghost.config import GhostDotProdConfig
from hf_gradtools.ghost.stored_run import ROWS, TEXTS, StoredRun
from hf_gradtools.ghost.train_config import GhostTrainConfig
from hf_gradtools.workflow.causal_lm import add_lora, load_model, load_tokenizer, make_collator
from hf_gradtools.workflow.data import SAMPLE_ID, hold_out, load_rows, number_rows, write_texts
from hf_gradtools.workflow.tokenizing import RowFormat, tokenize_rows


__all__ = ["GhostRun", "prepare_run"]

OPTIONS = "run.json"  # in the folder of a run
LEARNING_RATES = {True: 2e-4, False: 2e-5}  # of adapters, of all weights


@dataclass
class GhostRun:
    """A run that is ready to start.

    Attributes:
        config: its options.
        trainer: holds model, data and callback.
        callback: scores the samples.
        samples: training rows as tokenized, with their text.
        row_format: the columns they were made from.
    """

    config: GhostTrainConfig
    trainer: Trainer
    callback: GhostDotProdCallback
    samples: Dataset
    row_format: RowFormat

    def train(self) -> StoredRun:
        """Trains, and leaves model, rows and texts in the output folder."""
        folder = Path(self.config.output_dir)
        try:
            self.trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if self.config.resume else None)
        finally:
            self.callback.close()
        self.trainer.save_model()
        return StoredRun.open(folder)

    def summary(self) -> str:
        """One line on each of model, training rows and validation rows."""
        parameters = [(p.numel(), p.requires_grad) for p in self.trainer.model.parameters()]
        trained, total = sum(n for n, is_trained in parameters if is_trained), sum(n for n, _ in parameters)
        how = f"LoRA of rank {self.config.lora_rank}" if self.config.lora else "all weights"
        sets = self.callback.val_dataset
        validation = ", ".join(f"{len(rows):,} rows{f' of {name}' * (len(sets) > 1)}" for name, rows in sets.items())
        return (
            f"model       {self.config.model}: {how}, {trained / 1e6:,.2f} of {total / 1e6:,.2f} M parameters train\n"
            f"training    {len(self.samples):,} rows of {self.config.dataset}: {self.row_format}\n"
            f"validation  {validation}"
        )


def prepare_run(config: GhostTrainConfig) -> GhostRun:
    """Loads model and data. Writes no file, so that a mistake in the options leaves nothing behind.

    Raises:
        ValueError: an option does not fit the others, the data, the model, or what is in the output folder.
    """
    scoring = _scoring(config)
    _check_output_dir(config)
    tokenizer = load_tokenizer(config.model)
    train, validation = _load_data(config)
    samples, row_format = _tokenize(train, f"dataset={config.dataset!r}", tokenizer, config)
    scored = {name: _tokenize(rows, f"val={name!r}", tokenizer, config)[0] for name, rows in validation.items()}
    callback = GhostDotProdCallback(
        {name: rows.remove_columns("text") for name, rows in scored.items()}, config=scoring
    )
    set_seed(config.seed)
    model = load_model(config.model, config.dtype or ("auto" if config.lora else "float32"))
    trainer = Trainer(
        add_lora(model, config.lora_rank) if config.lora else model,
        _training_arguments(config),
        data_collator=make_collator(tokenizer),
        train_dataset=samples.remove_columns("text"),
        processing_class=tokenizer,
        callbacks=[callback, _WriteFiles(config, samples)],
    )
    if config.report_to != "none":
        callback.set_trainer(trainer)
    return GhostRun(config, trainer, callback, samples, row_format)


class _WriteFiles(TrainerCallback):
    """Writes options and texts once the callbacks before it have found nothing to complain about."""

    def __init__(self, config: GhostTrainConfig, samples: Dataset):
        self.config, self.samples = config, samples

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(self.config.output_dir)
            write_json_atomically(folder / OPTIONS, self.config.identity())
            write_texts(self.samples, folder / TEXTS)


def _scoring(config: GhostTrainConfig) -> GhostDotProdConfig:
    """The options that the callback knows under the same name, and those that it needs from here."""
    shared = {name: value for name, value in vars(config).items() if name in GhostDotProdConfig.option_names()}
    layers = "all-linear" if config.layers == ["all-linear"] else config.layers
    return GhostDotProdConfig(**{**shared, "output_dir": str(Path(config.output_dir) / ROWS), "layers": layers})


def _check_output_dir(config: GhostTrainConfig) -> None:
    options = Path(config.output_dir) / OPTIONS
    if not config.resume:
        if any((options.parent / ROWS).glob("shard-*")):
            raise ValueError(
                f"output_dir={config.output_dir!r} holds the rows of an earlier run. "
                "Continue it by resume=True, or pass another folder."
            )
        return
    if not options.exists():
        raise ValueError(f"output_dir={config.output_dir!r} holds no run to continue. Start one without resume=True.")
    before, now = json.loads(options.read_bytes()), json.loads(json.dumps(config.identity()))
    if changed := [
        f"{name}={value!r}, not {now.get(name)!r}" for name, value in before.items() if now.get(name) != value
    ]:
        raise ValueError(
            f"output_dir={config.output_dir!r} was begun with {'; '.join(changed)}. Resume with the same options."
        )


def _load_data(config: GhostTrainConfig) -> tuple[Dataset, dict[str, Dataset]]:
    """Training rows with ids, and the named validation sets."""
    train = number_rows(load_rows(config.dataset, config.split))
    validation = {}
    for name, source in _sources(config).items():
        size = _as_number(source)
        if size is None:
            validation[name] = number_rows(load_rows(source, config.val_split))
        else:
            train, validation[name] = hold_out(train, size, config.seed)
    return train, validation


def _tokenize(
    rows: Dataset, named: str, tokenizer: PreTrainedTokenizerBase, config: GhostTrainConfig
) -> tuple[Dataset, RowFormat]:
    columns = [name for name in rows.column_names if name != SAMPLE_ID]
    prompt = [name.strip() for name in (config.prompt_column or "").split(",") if name.strip()]
    try:
        row_format = RowFormat.detect(columns, config.text_column, prompt, config.response_column)
        return tokenize_rows(rows, tokenizer, row_format, config.max_length), row_format
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error


def _sources(config: GhostTrainConfig) -> dict[str, str]:
    return dict(config.val) if isinstance(config.val, Mapping) else {"validation": config.val}


def _as_number(source: str) -> float | None:
    """How many rows to hold out, if `source` says so and is no dataset."""
    try:
        return float(source)
    except ValueError:
        return None


def _training_arguments(config: GhostTrainConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate or LEARNING_RATES[config.lora],
        bf16=config.bf16,
        seed=config.seed,
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to=config.report_to,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,  # they are input_ids, labels, and the ids that the callback takes out
    )
