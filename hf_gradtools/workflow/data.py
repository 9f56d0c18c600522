"""Rows from the Hub or from files, some held out, and the texts of a run's samples."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_gradtools.core.store import atomic_write


__all__ = ["format_rows", "hold_out", "load_rows", "number_rows", "read_texts", "write_texts"]

SAMPLE_ID = "sample_id"
KEPT_CHARACTERS = 10_000  # of each text in the file that reports read
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SOURCES = f"a Hub id ('id' or 'id:config'), a file ({', '.join(BUILDERS)}) or a folder made by save_to_disk"


def load_rows(source: str, split: str | None = None) -> Dataset:
    """Reads one split of a dataset.

    Args:
        source (`str`): a Hub id (`id` or `id:config`), a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file (one
            row per line), or a folder made by `save_to_disk`.
        split (`str`, defaults to `"train"`): also a slice of one, such as `"train[:1000]"`.

    Returns:
        `datasets.Dataset`: at least one row.

    Raises:
        ValueError: if there is no such dataset or split, it cannot be read, or it has no rows.
    """
    path = Path(source).expanduser()
    if not path.exists() and (path.suffix in BUILDERS or source.startswith(("/", "./", "../", "~"))):
        raise ValueError(f"there is no file {source!r}. Pass {SOURCES}.")
    try:
        rows = _read(path, source, split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"dataset {source!r} cannot be read: {reason}. Pass {SOURCES}, and a split it has."
        ) from error
    if len(rows) == 0:
        raise ValueError(f"dataset {source!r} has 0 rows; at least 1 is needed. Pass another file or split.")
    return rows


def _read(path: Path, source: str, split: str | None) -> Dataset:
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"its ending {path.suffix!r} is none of {', '.join(BUILDERS)}")
        if path.stat().st_size == 0:
            return Dataset.from_dict({})
        rows = load_dataset(BUILDERS[path.suffix], data_files=str(path), split=split or "train")
        return rows.filter(_has_text, desc="Dropping empty lines") if path.suffix == ".txt" else rows
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _pick_split(load_from_disk(path), split)
    name, _, config = (source, "", "") if path.exists() else source.partition(":")
    return load_dataset(name, config or None, split=split or "train")


def _pick_split(saved: Dataset | DatasetDict, split: str | None) -> Dataset:
    if isinstance(saved, DatasetDict):
        if (split or "train") not in saved:
            raise ValueError(f"split={split or 'train'!r} is none of {', '.join(saved)}")
        return saved[split or "train"]
    if split is not None:
        raise ValueError(f"it is a single dataset, without a split {split!r}")
    return saved


def _has_text(row: Mapping[str, str]) -> bool:
    return bool(row["text"].strip())


def number_rows(rows: Dataset) -> Dataset:
    """`rows` with a column `sample_id`, by which results name them: the row's number unless there is one already."""
    return rows if SAMPLE_ID in rows.column_names else rows.add_column(SAMPLE_ID, np.arange(len(rows)))


def format_rows(rows: Dataset, format_row: Callable[[dict[str, Any]], Any], named: str = "dataset") -> Dataset:
    """Prompts and completions that a function of your own makes of each row.

    Args:
        rows (`datasets.Dataset`): rows with a `sample_id`, see [`number_rows`].
        format_row (`Callable`): takes a row, a `dict`; returns `{"prompt": str, "completion": str}`.
        named (`str`, defaults to `"dataset"`): what errors call the rows.

    Returns:
        `datasets.Dataset`: `sample_id`, `prompt`, `completion`.

    Raises:
        ValueError: if `format_row` asks for a column that the rows do not have, or returns something else.
    """
    columns = [name for name in rows.column_names if name != SAMPLE_ID]

    def convert(row: Mapping[str, Any]) -> dict[str, str]:
        made = format_row(_Row(row, named, columns))
        if not (
            isinstance(made, dict)
            and made.keys() == {"prompt", "completion"}
            and all(isinstance(text, str) for text in made.values())
        ):
            raise ValueError(
                f"format_row made {str(made)[:80]} of a row of {named}. "
                "Return {'prompt': ..., 'completion': ...}, both of them texts."
            )
        return made

    texts = {"prompt": Value("string"), "completion": Value("string")}
    features = Features({SAMPLE_ID: rows.features[SAMPLE_ID], **texts})
    return rows.map(convert, remove_columns=columns, features=features, desc="Formatting")


class _Row(dict[str, Any]):
    """A row that says what it has when asked for something else."""

    def __init__(self, row: Mapping[str, Any], named: str, columns: list[str]):
        super().__init__(row)
        self.named, self.columns = named, columns

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"{self.named} has no column {name!r}. It has {', '.join(self.columns)}. Pass a dataset that has it."
        )


def hold_out(rows: Dataset, size: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits off rows drawn at random; both parts keep their order.

    Args:
        rows (`datasets.Dataset`): all rows.
        size (`float`): rows to hold out, or their share if below 1.
        seed (`int`, defaults to 0): of the draw.

    Returns:
        `tuple[Dataset, Dataset]`: the rest, and what is held out.

    Raises:
        ValueError: if either part would be empty.
    """
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise ValueError(
            f"val={size:g} holds out {count} of {len(rows)} rows; training and validation need at least 1 each. "
            "Pass a share between 0 and 1, a smaller number of rows, or a validation dataset."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def write_texts(rows: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes `sample_id` and the beginning of `text` of each row to a JSON Lines file, whole or not at all."""
    with atomic_write(Path(path)) as file:
        for row in rows.select_columns([SAMPLE_ID, "text"]):
            line = {"id": row[SAMPLE_ID], "text": row["text"][:KEPT_CHARACTERS]}
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")


def read_texts(path: str | os.PathLike[str], ids: Collection[int | str] | None = None) -> dict[int | str, str]:
    """What [`write_texts`] wrote, by id, or only the texts of some `ids`; empty if there is no such file."""
    if not Path(path).exists():
        return {}
    return {sample_id: text for sample_id, text in _read_texts(Path(path)) if ids is None or sample_id in ids}


def _read_texts(path: Path) -> Iterator[tuple[int | str, str]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["id"], row["text"]
