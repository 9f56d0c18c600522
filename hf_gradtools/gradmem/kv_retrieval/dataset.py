"""Rows of a task as `datasets`: in memory, on disk, or as a stream."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

from hf_gradtools.core.atomic import rename_unless_there
from hf_gradtools.gradmem.kv_retrieval.generate import BLOCK_ROWS, Columns, generate_block
from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig
from hf_gradtools.gradmem.kv_retrieval.tokenizer import build_kv_tokenizer


FEATURES = Features(
    {
        "context": Value("string"),
        "query": Value("string"),
        "target": Value("string"),
        "kv_pairs": List(Value("string")),
    }
)


def generate_kv_dataset(
    config: KVRetrievalConfig | str,
    num_rows: int | None = None,
    seed: int = 0,
    num_proc: int = 1,
    split: str = "train",
    cache_file: str | Path | None = None,
) -> Dataset:
    """Rows of a task: columns "context", "query", "target" and "kv_pairs".

    The rows depend on the task, the seed and the split alone: not on the number of processes, and the first n are the
    same however many there are. In a small task, such as two keys of four symbols, rows repeat, within a split and
    between splits.

    Args:
        config: the task or its name.
        num_rows: how many; default the name's.
        seed: at least 0.
        num_proc: processes.
        split: "train" or "valid"; they are drawn apart.
        cache_file: Arrow file to hold them; default in memory.

    Raises:
        ValueError: no number of rows, or one below 1.
    """
    config, num_rows = _task(config, num_rows)
    _check("num_proc", num_proc, 1)
    blocks = Dataset.from_dict({"block": range(-(-num_rows // BLOCK_ROWS))})
    rows = blocks.map(
        partial(_columns, config=config, seed=_check("seed", seed, 0), split=split, num_rows=num_rows),
        batched=True,
        batch_size=1,
        writer_batch_size=BLOCK_ROWS,
        num_proc=min(num_proc, len(blocks)) if num_proc > 1 else None,
        remove_columns="block",
        features=FEATURES,
        cache_file_name=str(cache_file) if cache_file is not None else None,
        keep_in_memory=cache_file is None,
        desc=f"{config.name} {split}, blocks of {BLOCK_ROWS} rows",
    )
    return rows


def stream_kv_dataset(
    config: KVRetrievalConfig | str, num_rows: int | None = None, seed: int = 0, split: str = "train"
) -> IterableDataset:
    """The same rows in the same order, made when they are asked for; the arguments are [`generate_kv_dataset`]'s."""
    config, num_rows = _task(config, num_rows)
    arguments = {"config": config, "num_rows": num_rows, "seed": _check("seed", seed, 0), "split": split}
    blocks = list(range(-(-num_rows // BLOCK_ROWS)))
    return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs={"blocks": blocks, **arguments})


def save_kv_datasets(
    config: KVRetrievalConfig | str,
    out: str | Path,
    num_rows: int | None = None,
    valid_rows: int = 1000,
    seed: int = 0,
    num_proc: int = 1,
) -> DatasetDict:
    """Writes a folder with the splits "train" and "valid" and the tokenizer, which appears whole or not at all.

    Args:
        out: the folder, for `datasets.load_from_disk` and `AutoTokenizer.from_pretrained`.
        valid_rows: rows of "valid".

        The others are those of [`generate_kv_dataset`].

    Returns:
        what is on disk, not in memory.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: `out` is there.
    """
    config, num_rows = _task(config, num_rows)
    _check("valid_rows", valid_rows, 1)
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out={str(out)!r} is there already. Name another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        cache = unfinished / "cache"
        cache.mkdir()
        splits = {
            split: generate_kv_dataset(config, rows, seed, num_proc, split, cache / f"{split}.arrow")
            for split, rows in (("train", num_rows), ("valid", valid_rows))
        }
        DatasetDict(splits).save_to_disk(unfinished / "rows")
        build_kv_tokenizer(config.vocab_size).save_pretrained(unfinished / "rows")
        rename_unless_there(unfinished / "rows", out)
    finally:
        shutil.rmtree(unfinished)
    return DatasetDict.load_from_disk(out)


def _task(config: KVRetrievalConfig | str, num_rows: int | None) -> tuple[KVRetrievalConfig, int]:
    config = KVRetrievalConfig.from_name(config) if isinstance(config, str) else config
    num_rows = config.size if num_rows is None else num_rows
    if num_rows is None:
        raise ValueError(
            f"num_rows is missing, and the name {config.name!r} tells none. Pass it, or a name like {config.name}_10K."
        )
    return config, _check("num_rows", num_rows, 1)


def _check(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")
    return value


def _columns(batch: dict[str, list[int]], config: KVRetrievalConfig, seed: int, split: str, num_rows: int) -> Columns:
    (block,) = batch["block"]
    columns = generate_block(config, seed, block, split)
    return {name: values[: num_rows - block * BLOCK_ROWS] for name, values in columns.items()}


def _rows(
    blocks: list[int], config: KVRetrievalConfig, num_rows: int, seed: int, split: str
) -> Iterator[dict[str, Any]]:
    for block in blocks:
        columns = _columns({"block": [block]}, config, seed, split, num_rows)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
