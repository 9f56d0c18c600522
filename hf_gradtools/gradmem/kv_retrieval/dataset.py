"""Rows of a task as `datasets`: in memory, on disk, or as a stream."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from multiprocess import TimeoutError
from transformers.utils import logging

from hf_gradtools.gradmem.kv_retrieval.generate import BLOCK_ROWS, SPLITS, block_table
from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig
from hf_gradtools.gradmem.kv_retrieval.tokenizer import build_kv_tokenizer


logger = logging.get_logger(__name__)

UNFINISHED = ".tmp"
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
        ValueError: no number of rows, one below 1, or an unknown split.
    """
    task = _task(config, num_rows, seed, split)
    _check("num_proc", num_proc, 1)
    blocks = _blocks(task)
    workers = min(num_proc, len(blocks))
    try:
        return Dataset.from_dict({"block": blocks}).map(
            partial(_table, **task, parent=os.getpid() if workers > 1 else None),
            batched=True,
            batch_size=1,
            writer_batch_size=BLOCK_ROWS,
            num_proc=workers if workers > 1 else None,
            remove_columns="block",
            features=FEATURES,
            cache_file_name=None if cache_file is None else str(cache_file),
            keep_in_memory=cache_file is None,
            load_from_cache_file=False,  # what is there under that name may be of another task or seed
            desc=f"{task['config'].name} {split}, blocks of {BLOCK_ROWS} rows",
        )
    except TimeoutError as error:  # what `datasets` makes of an interrupt while its processes are at work
        raise KeyboardInterrupt from error


def stream_kv_dataset(
    config: KVRetrievalConfig | str, num_rows: int | None = None, seed: int = 0, split: str = "train"
) -> IterableDataset:
    """The same rows in the same order, made when they are asked for; the arguments are [`generate_kv_dataset`]'s.

    Workers of a `DataLoader` share the blocks of 1,000 rows among them.
    """
    task = _task(config, num_rows, seed, split)
    # Lists are what `datasets` splits among workers.
    return IterableDataset.from_generator(_rows, features=FEATURES, gen_kwargs={"blocks": [*_blocks(task)], **task})


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
    _check("valid_rows", valid_rows, 1)
    _check("num_proc", num_proc, 1)
    tasks = {"train": _task(config, num_rows, seed), "valid": _task(config, valid_rows, seed, "valid")}
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"out={str(out)!r} is there already. Name another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    _tell_leftovers(out)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=UNFINISHED, dir=out.parent))
    try:
        cache = unfinished / "cache"
        cache.mkdir()
        splits = {
            split: generate_kv_dataset(**task, num_proc=num_proc, cache_file=cache / f"{split}.arrow")
            for split, task in tasks.items()
        }
        DatasetDict(splits).save_to_disk(unfinished / "rows")
        build_kv_tokenizer(tasks["train"]["config"].vocab_size).save_pretrained(unfinished / "rows")
        (unfinished / "rows").rename(out)
    finally:
        shutil.rmtree(unfinished)
    return DatasetDict.load_from_disk(out)


def _tell_leftovers(out: Path) -> None:
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{UNFINISHED}"):
        logger.warning(f"{str(left)!r} is of a run that was killed, or that is at work. Remove it if none is.")


def _task(config: KVRetrievalConfig | str, num_rows: int | None, seed: int, split: str = "train") -> dict[str, Any]:
    """What rows depend on, checked."""
    config = KVRetrievalConfig.from_name(config) if isinstance(config, str) else config
    num_rows = config.size if num_rows is None else num_rows
    if num_rows is None:
        raise ValueError(
            f"num_rows is missing, and the name {config.name!r} tells none. Pass it, or a name like {config.name}_10K."
        )
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown. Pass one of {', '.join(SPLITS)}.")
    _check("num_rows", num_rows, 1)
    _check("seed", seed, 0)
    return {"config": config, "num_rows": num_rows, "seed": seed, "split": split}


def _blocks(task: dict[str, Any]) -> range:
    return range(-(-task["num_rows"] // BLOCK_ROWS))


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}.")


def _table(
    batch: dict[str, list[int]],
    config: KVRetrievalConfig,
    seed: int,
    split: str,
    num_rows: int,
    parent: int | None = None,
) -> pa.Table:
    """The rows of a block; `parent` is the process that a worker makes them for."""
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all; the parent ends its workers
        if os.getppid() != parent:
            os._exit(1)  # it was killed, and its pool would keep this worker for ever
    (block,) = batch["block"]
    return block_table(config, seed, block, split)[: num_rows - block * BLOCK_ROWS]


def _rows(blocks: list[int], **task: Any) -> Iterator[dict[str, Any]]:
    for block in blocks:
        yield from _table({"block": [block]}, **task).to_pylist()
