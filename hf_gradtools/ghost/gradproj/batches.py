"""Which dataset rows run through the model together, and what they look like there."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..models import base_model


Collator = Callable[[list[Any]], Any]

SAMPLE_ID = "sample_id"
_ROWS_PER_READ = 10_000
_HASHED_ROWS = 64  # of a dataset that makes its rows when asked
_LABELS = ("labels", "label", "label_ids")
# What padding means in the columns that models take; others are padded with zeros.
_PADDING = {"labels": -100}
_PER_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "position_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Window:
    """Consecutive rows of a dataset that reach the store together, in order.

    Attributes:
        start, stop: the rows.
        batches: the same rows, those of like length together.
    """

    start: int
    stop: int
    batches: list[list[int]]


def plan_windows(lengths: Sequence[int], window_rows: int, batch_size: int) -> list[Window]:
    """Cuts a dataset into windows, and each window into batches of like length, so that little is padded.

    Args:
        lengths: tokens of every row.
        window_rows: rows of a window: so many are lost at most when a run is killed.
        batch_size: rows of a batch.
    """
    windows = []
    for start in range(0, len(lengths), window_rows):
        stop = min(start + window_rows, len(lengths))
        order = sorted(range(start, stop), key=lambda i: (-lengths[i], i))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        windows.append(Window(start, stop, batches))
    return windows


def share_of_rank(windows: Sequence[Window], rank: int, world_size: int) -> list[Window]:
    """A rank's windows: consecutive ones, so that ranks one after the other are the dataset."""
    bounds = [len(windows) * r // world_size for r in range(world_size + 1)]
    return list(windows[bounds[rank] : bounds[rank + 1]])


def check_dataset(rows: Any) -> None:
    """ValueError if these are no rows to project."""
    if isinstance(rows, Mapping):
        raise ValueError(f"dataset is a mapping of {', '.join(map(str, rows))}; pass one split, such as ds['train']")
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ValueError(
            f"dataset is a {type(rows).__name__} without length or indices; pass a map-style dataset, such as "
            "Dataset.from_list(list(rows))"
        )
    if len(rows) == 0:
        raise ValueError("dataset has 0 rows; at least 1 is needed. Pass ds['train'].")


def row_lengths(rows: Any) -> list[int]:
    """Tokens of every row; zeros where that is not known without making each row."""
    if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
        lengths: list[int] = []
        for table in rows.select_columns("input_ids").with_format("arrow").iter(_ROWS_PER_READ):
            lengths += pc.list_value_length(table["input_ids"]).to_pylist()
        return lengths
    if isinstance(rows, (list, tuple)):
        return [len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0 for row in rows]
    return [0] * len(rows)


def row_ids(rows: Any, column: str = SAMPLE_ID) -> list[int] | list[str]:
    """The ids of all rows: a column, or their numbers.

    Raises:
        ValueError: some are numbers, some strings.
    """
    if isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) and column in row for row in rows):
        ids = [row[column] for row in rows]
    else:
        ids = list(rows[column]) if column in (getattr(rows, "column_names", None) or []) else list(range(len(rows)))
    if len({isinstance(sample_id, str) for sample_id in ids}) > 1:
        raise ValueError(f"column {column!r} holds numbers and strings; make all ids of one kind")
    return ids


def dataset_fingerprint(rows: Any) -> str:
    """A hash of all columns: of every row of a `datasets.Dataset`, of some rows of another dataset."""
    digest = hashlib.blake2b(str(len(rows)).encode(), digest_size=8)
    if isinstance(rows, Dataset):
        for table in rows.with_format("arrow").iter(_ROWS_PER_READ):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
    else:
        for i in range(0, len(rows), max(1, len(rows) // _HASHED_ROWS)):
            digest.update(_content(rows[i]))
    return digest.hexdigest()


def batch_fingerprint(batch: Mapping[str, Any]) -> str:
    """A hash of what a collator made."""
    return hashlib.blake2b(_content(batch), digest_size=8).hexdigest()


def _content(row: Any) -> bytes:
    if not isinstance(row, Mapping):
        return repr(row).encode()
    values = {key: row[key].cpu() if isinstance(row[key], Tensor) else row[key] for key in sorted(row, key=str)}
    return b"".join(str(key).encode() + np.asarray(value).tobytes() for key, value in values.items())


class BatchMaker:
    """Rows to batches on a device, as `Trainer` would make them.

    What the model does not take is left out: of the rows where the collator is one of transformers', which would stack
    it; of the batch in any case.

    Args:
        model: whose `forward` says what it takes.
        collator: default :func:`pad_rows`.
        for_model: the batch goes to the model alone; a loss function of one's own may want all of it.
    """

    def __init__(self, model: nn.Module, collator: Collator | None, for_model: bool = True):
        self.collator = collator or pad_rows
        self.device = next(model.parameters()).device
        base = base_model(model)
        self.taken: set[str] | None = None
        if for_model and isinstance(base, PreTrainedModel):
            parameters = list(inspect.signature(type(base).forward).parameters.values())[1:]
            if any(p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL for p in parameters):
                self.taken = {*(p.name for p in parameters), *_LABELS}
        made_by = getattr(self.collator, "__module__", "")
        self.filters_rows = self.collator is pad_rows or made_by.startswith("transformers.")

    def __call__(self, rows: Any, indices: Sequence[int]) -> dict[str, Any]:
        picked = [rows[i] for i in indices]
        if self.filters_rows:
            picked = [self._filtered(row) if isinstance(row, Mapping) else row for row in picked]
        batch = self.collator(picked)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the data collator returned a {type(batch).__name__}; GradProjector needs a mapping of model inputs, "
                "as transformers' collators return"
            )
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in self._filtered(batch).items()}

    def _filtered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if k != SAMPLE_ID and (self.taken is None or k in self.taken)}


def pad_rows(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks tokenized rows, those of other lengths padded on the right: masked, and with label −100.

    Raises:
        ValueError: rows lack `input_ids` or columns of the others, or a column holds something else than numbers.
    """
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise ValueError("rows have no 'input_ids'; tokenize the dataset, or pass a data_collator that makes batches")
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    batch = {}
    for name in rows[0]:
        try:
            values = [torch.as_tensor(row[name]) for row in rows]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            shown = [row.get(name, "<absent>") for row in rows][:3]
            raise ValueError(
                f"column {name!r} holds {str(shown):.80}, not numbers in every row; remove it, or pass a data_collator"
            ) from error
        if name in ("label", "label_ids"):
            name = "labels"
        if values[0].ndim == 1 and (name in _PER_TOKEN or len({len(v) for v in values}) > 1):
            batch[name] = pad_sequence(values, batch_first=True, padding_value=_PADDING.get(name, 0))
        else:
            batch[name] = torch.stack(values)
    return batch
