"""From rows (one per sample and step) to per-sample data values: group, rank, merge what was served twice."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, concatenate_datasets


if TYPE_CHECKING:
    import pandas as pd


__all__ = ["GhostValues", "Rows", "ghost_values", "merge_duplicate_rows", "validation_set_names"]

Rows: TypeAlias = Dataset | pa.Table | Sequence[Mapping[str, Any]]

UNNAMED_VALIDATION_SET = "validation"  # the name of a single set, whose columns carry none
ROW_KEY = ("step", "sample_id", "segment")
ADDITIVE = ("dot_product", "value", "layer_dot_products", "second_order")  # beginnings of column names


@dataclass(frozen=True, eq=False, repr=False)
class GhostValues:
    """Per-sample data values for one validation set, over all steps in which a sample was scored.

    Args:
        val (`str`): the validation set.
        sample_id (`np.ndarray`): integers or strings `[n]`, in the order in which training met them.
        value (`np.ndarray`): estimated change of the validation loss by the sample, summed over its steps, `[n]`.
            Negative: it lowered the loss, that is, it helped.
        times_seen (`np.ndarray`): number of steps in which the sample was scored, `[n]`.
        dot_product (`np.ndarray`): mean of its gradient dot products, `[n]`.
        first_loss, sample_loss, grad_norm (`np.ndarray`, *optional*): its loss when first seen, and the means of its
            loss and of its gradient norm, `[n]`.
    """

    val: str
    sample_id: np.ndarray
    value: np.ndarray
    times_seen: np.ndarray
    dot_product: np.ndarray
    first_loss: np.ndarray | None = None
    sample_loss: np.ndarray | None = None
    grad_norm: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sample_id)

    def __repr__(self) -> str:
        return f"GhostValues(val={self.val!r}, {len(self)} samples, total value {np.nansum(self.value):.4g})"

    def most_helpful(self, k: int = 10) -> list[dict[str, Any]]:
        """The `k` samples of lowest value, best first: a dict of plain values each, keyed by field name."""
        return self._records(self._ranking(), k)

    def most_harmful(self, k: int = 10) -> list[dict[str, Any]]:
        """The `k` samples of highest value, worst first, as in `most_helpful`."""
        return self._records(self._ranking()[::-1], k)

    def columns(self) -> dict[str, np.ndarray]:
        """The per-sample arrays that exist, by field name."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "val"}
        return {name: array for name, array in arrays.items() if array is not None}

    def to_pandas(self) -> pd.DataFrame:
        """The table as a `pandas.DataFrame`, one row per sample."""
        import pandas as pd

        return pd.DataFrame(self.columns())

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the distribution of the values to an image file, whose ending sets the format, and returns its path.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib. Install it: pip install 'hf_gradtools[viz]'") from error
        values = self.value[np.isfinite(self.value)]
        axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
        edges = np.histogram_bin_edges(values, bins=60)
        for half, colour, label in ((values < 0, "#1f6fb5", "helps"), (values >= 0, "#c8551b", "harms")):
            axes.hist(values[half], bins=edges.tolist(), color=colour, label=f"{label} ({half.sum():,})")
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set(xlabel=f"value: change of the loss on {self.val!r}", ylabel="samples")
        axes.legend(frameon=False)
        figure.savefig(path)
        return Path(path)

    def _ranking(self) -> np.ndarray:
        """Row numbers by rising value; samples without a finite value are left out."""
        order = np.argsort(self.value, kind="stable")
        return np.compress(np.isfinite(self.value[order]), order)

    def _records(self, rows: np.ndarray, k: int) -> list[dict[str, Any]]:
        if k < 1:
            raise ValueError(f"k={k}; pass how many samples to list, at least 1.")
        picked = {name: array[rows[:k]].tolist() for name, array in self.columns().items()}
        return [dict(zip(picked, row, strict=True)) for row in zip(*picked.values(), strict=True)]


def ghost_values(rows: Rows, val: str | None = None) -> GhostValues:
    """Sums the rows of each sample to its data value. Reads only the columns needed, in one vectorised pass.

    Rows whose value is not finite (a step that overflowed and that a loss scaler skipped) count as seen but add
    nothing, with one warning; a sample without any finite row has value NaN.

    Args:
        rows (`datasets.Dataset`, `pyarrow.Table` or list of `dict`): rows as the callback writes them.
        val (`str`, *optional*): validation set; may be left out when there is only one.

    Returns:
        [`GhostValues`]: one entry per `sample_id`.

    Raises:
        ValueError: if there are no rows, no such validation set, or several and `val` is not given.
    """
    names = validation_set_names(rows)
    if val is None and len(names) > 1:
        raise ValueError(f"val=None, but the rows score {len(names)} validation sets. Pass val= one of {names}.")
    suffix = column_suffix(rows, val := names[0] if val is None and names else val)
    value, dot = f"value{suffix}", f"dot_product{suffix}"
    wanted = [(value, "sum"), (value, "count"), (dot, "mean"), ("step", "count_distinct")]
    optional = [("sample_loss", "first"), ("sample_loss", "mean"), ("grad_norm", "mean")]
    table = group_rows(rows, "sample_id", wanted + [pair for pair in optional if pair[0] in column_names(rows)])
    if lost := len(rows) - int(table[f"{value}_count"].sum()):
        warnings.warn(f"{lost} rows have no finite {value!r}; they are left out of the sums.", stacklevel=2)
    return GhostValues(
        val=str(val),
        sample_id=table["sample_id"],
        value=table[f"{value}_sum"],
        times_seen=table["step_count_distinct"],
        dot_product=table[f"{dot}_mean"],
        first_loss=table.get("sample_loss_first"),
        sample_loss=table.get("sample_loss_mean"),
        grad_norm=table.get("grad_norm_mean"),
    )


def validation_set_names(rows: Rows) -> list[str]:
    """The validation sets that the rows score, in column order; a single set without a name is `"validation"`."""
    columns = column_names(rows)
    named = [column.removeprefix("dot_product/") for column in columns if column.startswith("dot_product/")]
    return [UNNAMED_VALIDATION_SET] if "dot_product" in columns else named


def merge_duplicate_rows(dataset: Dataset) -> Dataset:
    """Makes one row of those with equal (step, sample_id, segment): a sample served twice within a step.

    `accelerate` does so when it pads the last batch across ranks, and so does sampling with replacement. Dot
    products and values are summed, because both servings moved the weights; other columns keep the first row's.

    Returns:
        `datasets.Dataset`: `dataset` itself if nothing is duplicated, else its rows merged, in the old order; only
        those that had duplicates are copied.
    """
    keys = [key for key in ROW_KEY if key in dataset.column_names]
    if not keys:
        return dataset
    numbered = read_columns(dataset, keys).append_column("row", pa.array(np.arange(len(dataset))))
    groups = numbered.group_by(keys, use_threads=False).aggregate([("row", "list")])["row_list"]
    if len(groups) == len(dataset):
        return dataset
    sizes, rows = pc.list_value_length(groups).to_numpy(), pc.list_flatten(groups).to_numpy()
    repeated, starts = sizes > 1, np.cumsum(sizes) - sizes
    twins = dataset.select(rows[np.repeat(repeated, sizes)])
    sums = _sum_groups(read_columns(twins, dataset.column_names), np.cumsum(sizes[repeated]) - sizes[repeated])
    firsts = rows[starts]  # of each group, in the old order
    source = np.where(repeated, len(dataset) + np.cumsum(repeated) - 1, firsts)
    both = concatenate_datasets([dataset, Dataset(sums, info=DatasetInfo(features=dataset.features))])
    return both.select(source[np.argsort(firsts)])


def column_names(rows: Rows) -> list[str]:
    """The columns of the rows, whichever way they are held."""
    if isinstance(rows, Dataset | pa.Table):
        return list(rows.column_names)
    return list(rows[0]) if rows else []


def column_suffix(rows: Rows, val: str | None) -> str:
    """What follows `dot_product` and `value` in the column names of `val`; ValueError if it has no rows."""
    if len(rows) == 0:
        raise ValueError("the dataset has 0 rows; values need at least 1. Pass the rows of a run that made a step.")
    if val not in (names := validation_set_names(rows)):
        remedy = f"Pass one of {names}" if names else f"Pass rows with 'dot_product', not {column_names(rows)}"
        raise ValueError(f"val={val!r} is no validation set of the rows. {remedy}.")
    return f"/{val}" if f"dot_product/{val}" in column_names(rows) else ""


def read_columns(rows: Rows, names: Sequence[str], start: int = 0, length: int | None = None) -> pa.Table:
    """These columns of `length` rows from `start`; those of a mapped `Dataset` without index mapping copy nothing.

    Raises:
        ValueError: if a column is missing.
    """
    if missing := [name for name in names if name not in column_names(rows)]:
        raise ValueError(f"the rows lack the columns {missing}; they have {column_names(rows)}. Pass ghost rows.")
    if isinstance(rows, Dataset):
        table = rows.data.table.select(list(names))
        # Dataset's own reading gathers indexed rows one by one, which takes a minute for some millions of them.
        if rows._indices is not None:
            return table.take(rows._indices.column(0).slice(start, length))
        return table.slice(start, length)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows))
    return table.select(list(names)).slice(start, length)


def group_rows(rows: Rows, key: str, aggregations: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Groups rows in order of their steps.

    Args:
        rows (`Rows`): the rows.
        key (`str`): column to group by.
        aggregations (`Sequence[tuple[str, str]]`): (numeric column, Arrow's name of an aggregation) pairs. Numbers
            that are not finite are left out; a group that has no others is NaN.

    Returns:
        `dict[str, np.ndarray]`: `key` and one array per pair, named `column_aggregation`, in order of appearance.
    """
    names = dict.fromkeys(["step", key, *(column for column, _ in aggregations)])
    table = read_columns(rows, list(names)).sort_by("step")
    for i, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float64())
            table = table.set_column(i, table.column_names[i], pc.if_else(pc.is_finite(column), column, None))
    grouped = table.group_by(key, use_threads=False).aggregate(list(aggregations))
    return {name: grouped[name].to_numpy() for name in grouped.column_names}


def _sum_groups(table: pa.Table, starts: np.ndarray) -> pa.Table:
    """One row per group of consecutive rows: additive columns summed in float64, of others the first row."""
    first = table.take(starts)
    for i, field in enumerate(table.schema):
        if field.name.startswith(ADDITIVE):
            rows = np.array(table[field.name].to_pylist(), dtype=np.float64)  # [rows] or [rows, layers]
            sums = pa.array(list(np.add.reduceat(rows, starts, axis=0)), type=field.type)
            first = first.set_column(i, field, sums)
    return first
