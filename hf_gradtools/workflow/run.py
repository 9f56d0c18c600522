"""The steps that training workflows share: output folder, data, token ids, the arguments of a `Trainer`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments

from hf_gradtools.core.store import write_json_atomically
from hf_gradtools.workflow.data import SAMPLE_ID, format_rows, hold_out, load_rows, number_rows
from hf_gradtools.workflow.options import DataOptions, RunOptions
from hf_gradtools.workflow.tokenizing import RowFormat, tokenize_rows


__all__ = [
    "OPTIONS",
    "WriteOptions",
    "check_same_options",
    "load_data",
    "tokenize",
    "trained_share",
    "training_arguments",
]

OPTIONS = "run.json"  # in the folder of a run
Arguments = TypeVar("Arguments", bound=TrainingArguments)


class WriteOptions(TrainerCallback):
    """Writes a run's options once the callbacks before it have found nothing to complain about."""

    def __init__(self, options: RunOptions):
        self.options = options

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json_atomically(Path(self.options.output_dir) / OPTIONS, self.options.identity())


class _HasIdentity(Protocol):
    """Options that know which of them a resumed run must share."""

    def identity(self) -> dict[str, Any]: ...


def check_same_options(options: _HasIdentity, folder_option: str = "output_dir") -> None:
    """ValueError unless the folder that an option names holds a run that was begun with these options."""
    folder = getattr(options, folder_option)
    path = Path(folder) / OPTIONS
    if not path.exists():
        raise ValueError(f"{folder_option}={folder!r} holds no run to continue. Start one without resume=True.")
    before, now = json.loads(path.read_bytes()), json.loads(json.dumps(options.identity()))
    if changed := [
        f"{name}={value!r}, not {now.get(name)!r}" for name, value in before.items() if now.get(name) != value
    ]:
        raise ValueError(
            f"{folder_option}={folder!r} was begun with {'; '.join(changed)}. Resume with the same options."
        )


def load_data(
    options: RunOptions, sources: Mapping[str, str], format_row: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[Dataset, dict[str, Dataset]]:
    """Training rows with ids, and validation sets named as in `sources`; all of them made by `format_row`, if given.

    Raises:
        ValueError: a dataset cannot be read, too few rows are left, or `format_row` does not fit them.
    """

    def load(source: str, split: str | None, named: str) -> Dataset:
        rows = number_rows(load_rows(source, split))
        return rows if format_row is None else format_rows(rows, format_row, named)

    train = load(options.dataset, options.split, f"dataset={options.dataset!r}")
    validation = {}
    for name, source in sources.items():
        size = _as_number(source)
        if size is None:
            validation[name] = load(source, options.val_split, f"val={source!r}")
        else:
            train, validation[name] = hold_out(train, size, options.seed)
    return train, validation


def tokenize(
    rows: Dataset, named: str, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> tuple[Dataset, RowFormat]:
    """`rows` as `tokenize_rows` makes them, and the columns it took; `named` says in errors which rows they are."""
    columns = [name for name in rows.column_names if name != SAMPLE_ID]
    prompt = [name.strip() for name in (options.prompt_column or "").split(",") if name.strip()]
    try:
        row_format = RowFormat.detect(columns, options.text_column, prompt, options.response_column)
        return tokenize_rows(rows, tokenizer, row_format, options.max_length), row_format
    except ValueError as error:
        raise ValueError(f"{named}: {error}") from error


def _as_number(source: str) -> float | None:
    """How many rows to hold out, if `source` says so and is no dataset."""
    try:
        return float(source)
    except ValueError:
        return None


def training_arguments(kind: type[Arguments], options: RunOptions, **more: Any) -> Arguments:
    """The `Trainer`'s arguments, of the class that it wants."""
    shared = {
        "output_dir": options.output_dir,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "bf16": options.bf16,
        "seed": options.seed,
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": options.report_to,
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused there
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "remove_unused_columns": False,  # what the model does not take is gone, or a callback takes it out
    }
    return kind(**{**shared, **more})


def trained_share(model: nn.Module) -> str:
    """How many of the model's parameters train."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, is_trained in parameters if is_trained), sum(n for n, _ in parameters)
    return f"{trained / 1e6:,.2f} of {total / 1e6:,.2f} M parameters train"
