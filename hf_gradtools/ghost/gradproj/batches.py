"""Which dataset rows run through the model together, and what they look like there."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..sample_ids import content_hash


Collator = Callable[[list[Any]], Any]

_ROWS_PER_READ = 10_000
_HASHED_ROWS = 64  # of a dataset: enough to tell two apart, nothing to wait for
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


def row_lengths(rows: Any) -> list[int]:
    """Tokens of every row, zeros where rows are not tokenized."""
    if isinstance(rows, Dataset):
        if "input_ids" not in rows.column_names:
            return [0] * len(rows)
        lengths: list[int] = []
        for table in rows.select_columns("input_ids").with_format("arrow").iter(_ROWS_PER_READ):
            lengths += pc.list_value_length(table["input_ids"]).to_pylist()
        return lengths
    return [len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 0 for row in rows]


def row_ids(rows: Any, column: str = "sample_id") -> list[int] | list[str]:
    """The ids of all rows: a column, or their numbers."""
    names = getattr(rows, "column_names", None) or []
    return list(rows[column]) if column in names else list(range(len(rows)))


def dataset_fingerprint(rows: Any) -> str:
    """A hash of the number of rows and the content of some."""
    digest = hashlib.blake2b(str(len(rows)).encode(), digest_size=8)
    for i in range(0, len(rows), max(1, len(rows) // _HASHED_ROWS)):
        digest.update(content_hash(rows[i]).to_bytes(8, "little"))
    return digest.hexdigest()


class BatchMaker:
    """Rows to batches on a device: columns that the model does not take are left out, the rest is collated.

    Args:
        model: whose `forward` says what it takes.
        collator: default :func:`pad_rows`.
    """

    def __init__(self, model: nn.Module, collator: Collator | None):
        self.collator = collator or pad_rows
        self.device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters
        self.taken = {*parameters, "labels", "label", "label_ids"} if "labels" in parameters else None

    def __call__(self, rows: Any, indices: Sequence[int]) -> dict[str, Any]:
        picked = [rows[i] for i in indices]
        if self.taken is not None:
            picked = [{k: v for k, v in r.items() if k in self.taken} if isinstance(r, Mapping) else r for r in picked]
        batch = self.collator(picked)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the data collator returned a {type(batch).__name__}; GradProjector needs a mapping of model inputs, "
                "as transformers' collators return"
            )
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def pad_rows(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks tokenized rows, those of other lengths padded on the right: masked, and with label −100.

    Raises:
        ValueError: rows lack `input_ids`, or a column holds something else than numbers.
    """
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise ValueError("rows have no 'input_ids'; tokenize the dataset, or pass a data_collator that makes batches")
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    batch = {}
    for name in rows[0]:
        try:
            values = [torch.as_tensor(row[name]) for row in rows]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {name!r} holds {rows[0][name]!r:.60}, not numbers; remove it, or pass a data_collator"
            ) from error
        if name in ("label", "label_ids"):
            name = "labels"
        if values[0].ndim == 1 and (name in _PER_TOKEN or len({len(v) for v in values}) > 1):
            batch[name] = pad_sequence(values, batch_first=True, padding_value=_PADDING.get(name, 0))
        else:
            batch[name] = torch.stack(values)
    return batch
