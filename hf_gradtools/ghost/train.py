"""The workflow of `hf-gradtools ghost train`: a causal LM, its data, a `Trainer` that scores every training sample.

```python
run = prepare_run(GhostTrainConfig(model="HuggingFaceTB/SmolLM2-135M", dataset="train.jsonl", output_dir="out"))
stored = run.train()
stored.write_report()
stored.values()["validation"].most_harmful(10)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_gradtools.ghost.callback import GhostDotProdCallback
from hf_gradtools.ghost.config import GhostDotProdConfig
from hf_gradtools.ghost.stored_run import ROWS, TEXTS, StoredRun
from hf_gradtools.ghost.train_config import GhostTrainConfig
from hf_gradtools.workflow.causal_lm import add_lora, load_model, load_tokenizer, make_collator
from hf_gradtools.workflow.data import write_texts
from hf_gradtools.workflow.run import (
    WriteOptions,
    check_same_options,
    load_data,
    tokenize,
    trained_share,
    training_arguments,
)
from hf_gradtools.workflow.tokenizing import RowFormat


__all__ = ["GhostRun", "prepare_run"]

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
        how = f"LoRA of rank {self.config.lora_rank}" if self.config.lora else "all weights"
        sets = self.callback.val_dataset
        validation = ", ".join(f"{len(rows):,} rows{f' of {name}' * (len(sets) > 1)}" for name, rows in sets.items())
        return (
            f"model       {self.config.model}: {how}, {trained_share(self.trainer.model)}\n"
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
    train, validation = load_data(config, _sources(config))
    samples, row_format = tokenize(train, f"dataset={config.dataset!r}", tokenizer, config)
    scored = {name: tokenize(rows, f"val={name!r}", tokenizer, config)[0] for name, rows in validation.items()}
    callback = GhostDotProdCallback(
        {name: rows.remove_columns("text") for name, rows in scored.items()}, config=scoring
    )
    set_seed(config.seed)
    model = load_model(config.model, config.dtype or ("auto" if config.lora else "float32"))
    trainer = Trainer(
        add_lora(model, config.lora_rank) if config.lora else model,
        training_arguments(
            TrainingArguments, config, learning_rate=config.learning_rate or LEARNING_RATES[config.lora]
        ),
        data_collator=make_collator(tokenizer),
        train_dataset=samples.remove_columns("text"),
        processing_class=tokenizer,
        callbacks=[callback, _WriteFiles(config, samples)],
    )
    if config.report_to != "none":
        callback.set_trainer(trainer)
    return GhostRun(config, trainer, callback, samples, row_format)


class _WriteFiles(WriteOptions):
    """Writes the texts too."""

    def __init__(self, config: GhostTrainConfig, samples: Dataset):
        super().__init__(config)
        self.samples = samples

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            write_texts(self.samples, Path(self.options.output_dir) / TEXTS)


def _scoring(config: GhostTrainConfig) -> GhostDotProdConfig:
    """The options that the callback knows under the same name, and those that it needs from here."""
    shared = {name: value for name, value in vars(config).items() if name in GhostDotProdConfig.option_names()}
    layers = "all-linear" if config.layers == ["all-linear"] else config.layers
    return GhostDotProdConfig(**{**shared, "output_dir": str(Path(config.output_dir) / ROWS), "layers": layers})


def _check_output_dir(config: GhostTrainConfig) -> None:
    if config.resume:
        check_same_options(config)
    elif any((Path(config.output_dir) / ROWS).glob("shard-*")):
        raise ValueError(
            f"output_dir={config.output_dir!r} holds the rows of an earlier run. "
            "Continue it by resume=True, or pass another folder."
        )


def _sources(config: GhostTrainConfig) -> dict[str, str]:
    return dict(config.val) if isinstance(config.val, Mapping) else {"validation": config.val}
