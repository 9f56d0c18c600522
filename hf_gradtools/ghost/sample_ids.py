"""Which training samples a batch holds: ids that ride along from the dataset, through workers, to the model's call.

`Trainer` shows a callback neither batches nor indices. The dataset under its dataloader is wrapped so that each row
comes with its id, and the collator so that the batch carries the ids under a private key, which a hook on the model
takes out again before the model sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..core.samples import SampleLayout


@dataclass
class BatchIds:
    """What the collator knows of the R dataset rows in a batch.

    Attributes:
        ids: id of each row, all int or all str.
        hashes: 64-bit content hash of each row.
        lengths: tokens of each row before padding or packing.
    """

    ids: list[int] | list[str]
    hashes: list[int]
    lengths: list[int]


class IdDataset(Dataset):
    """A map-style dataset whose rows come as `(index, row)`."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        rows = fetch(list(indices)) if fetch is not None else [self.dataset[index] for index in indices]
        return [(int(index), row) for index, row in zip(indices, rows, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


class IdCollator:
    """Collates the rows of an :class:`IdDataset` (or rows that carry their id) and adds :class:`BatchIds` at `key`."""

    def __init__(self, collate: Callable[[list[Any]], Any], key: str, id_column: str, tagged: bool):
        self.collate, self.key, self.id_column, self.tagged = collate, key, id_column, tagged

    def __call__(self, served: list[Any]) -> Any:
        rows = [row for _, row in served] if self.tagged else served
        numbers = [index for index, _ in served] if self.tagged else [None] * len(rows)
        ids = [self._id(index, row) for index, row in zip(numbers, rows, strict=True)]
        bare = [self._without_id(row) for row in rows]
        batch = self.collate(list(zip(numbers, bare, strict=True)) if self._wraps_tagged() else bare)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the data collator returned a {type(batch).__name__}; the ghost callbacks need a mapping of model "
                "inputs, as transformers' collators return"
            )
        hashes = [content_hash(row) for row in bare]
        batch[self.key] = BatchIds(ids, hashes, [_length(row) for row in bare])
        return batch

    def _wraps_tagged(self) -> bool:
        """Whether another callback's collator is below, which wants the numbers of rows too."""
        return isinstance(self.collate, IdCollator) and self.collate.tagged

    def _id(self, index: int | None, row: Any) -> int | str:
        if isinstance(row, Mapping) and self.id_column in row:
            return _checked_id(row[self.id_column], self.id_column)
        if index is None:
            raise ValueError(
                f"the training dataset is iterable and its rows have no column {self.id_column!r}, so its samples "
                "cannot be told apart; add one, e.g. "
                f"dataset.map(lambda row, i: {{'{self.id_column}': i}}, with_indices=True)"
            )
        return index

    def _without_id(self, row: Any) -> Any:
        below, shared = self.collate, False
        while isinstance(below, IdCollator):
            shared, below = shared or below.id_column == self.id_column, below.collate
        if shared or not isinstance(row, Mapping):
            return row
        return {k: v for k, v in row.items() if k != self.id_column}


def install_ids(dataloader: Any, key: str, id_column: str) -> Callable[[], None]:
    """Makes the batches of a dataloader carry ids; returns what undoes it.

    Args:
        dataloader: a `DataLoader` or accelerate's wrapper around one.
        key: name under which :class:`BatchIds` lies in each batch.
        id_column: column of the rows that holds their id, if there is one.

    Raises:
        ValueError: the dataset is iterable and is known to have no such column.
    """
    loader: DataLoader = getattr(dataloader, "base_dataloader", dataloader)
    dataset = loader.dataset
    iterable = isinstance(dataset, IterableDataset)
    mine = IdCollator(loader.collate_fn, key, id_column, tagged=not iterable)
    if iterable:
        columns = getattr(dataset, "column_names", None)
        if columns is not None and id_column not in columns:
            mine._id(None, {})
    elif not isinstance(dataset, IdDataset):  # another callback may have been here
        # DataLoader guards this attribute against reassignment because samplers may hold the dataset; ours has the
        # same length and order.
        object.__setattr__(loader, "dataset", IdDataset(dataset))
    loader.collate_fn = mine

    def undo() -> None:
        _unlink(loader, mine)
        if not isinstance(loader.collate_fn, IdCollator):  # the last one
            object.__setattr__(loader, "dataset", bare_dataset(loader.dataset))

    return undo


def _unlink(loader: DataLoader, link: IdCollator) -> None:
    """Takes one collator out of those that callbacks have put around each other."""
    holder: Any = loader
    current = loader.collate_fn
    while isinstance(current, IdCollator):
        if current is link:
            setattr(holder, "collate_fn" if holder is loader else "collate", link.collate)
            return
        holder, current = current, current.collate


def content_hash(row: Any) -> int:
    """A 64-bit hash of a row's `input_ids` (of all its fields where it has none), to join rows after a reshuffle."""
    if isinstance(row, Mapping) and "input_ids" in row:
        payload = np.asarray(row["input_ids"], dtype=np.int64).tobytes()
    elif isinstance(row, Mapping):
        payload = b"".join(str(k).encode() + np.asarray(row[k]).tobytes() for k in sorted(row, key=str))
    else:
        payload = repr(row).encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")


def locate_samples(ids: BatchIds, layout: SampleLayout) -> tuple[list[int], list[int]]:
    """For every sample of a batch the dataset row it comes from (0…R−1) and its number within that row.

    Args:
        ids: of the R rows that were collated.
        layout: of the batch that the model got: a row each, rows packed with several samples, or all flattened into
            one row.

    Raises:
        ValueError: the batch has another number of samples than rows were collated.
    """
    num_rows = len(ids.ids)
    if layout.segments is None:
        if layout.rows == num_rows:
            return list(range(num_rows)), [0] * num_rows
        raise ValueError(
            f"the model was called with {layout.rows} rows for {num_rows} dataset rows; GhostDotProdCallback needs "
            "one row per sample, or packed rows with position_ids (as DataCollatorWithFlattening makes them)"
        )
    flat = layout.segments.flatten()
    starts = torch.cat([flat.new_zeros(1), (flat[1:] != flat[:-1]).nonzero().flatten() + 1]).cpu()
    if layout.rows == num_rows:
        owner = starts // layout.segments.shape[1]
    else:
        ends = torch.tensor(ids.lengths).cumsum(0)
        owner = torch.searchsorted(ends, starts, right=True).clamp_max(num_rows - 1)
    owners = owner.tolist()
    number: list[int] = []
    for i, row in enumerate(owners):
        number.append(number[-1] + 1 if i and owners[i - 1] == row else 0)
    return owners, number


def _checked_id(value: Any, column: str) -> int | str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
        return int(value)
    raise ValueError(f"column {column!r} holds {value!r}; sample ids must be whole numbers or strings")


def _length(row: Any) -> int:
    return len(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else 1


def bare_collator(collate: Any) -> Any:
    """The collator below those that ghost callbacks have put around it."""
    while isinstance(collate, IdCollator):
        collate = collate.collate
    return collate


def bare_dataset(dataset: Any) -> Any:
    """The dataset below those that ghost callbacks have put around it."""
    while isinstance(dataset, IdDataset):
        dataset = dataset.dataset
    return dataset
