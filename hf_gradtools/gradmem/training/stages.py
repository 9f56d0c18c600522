"""The rows of a run: one stage, or several of a curriculum, each generated as it is needed or read from a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, DatasetDict, load_from_disk

from hf_gradtools.gradmem.kv_retrieval import KVRetrievalConfig
from hf_gradtools.gradmem.kv_retrieval.generate import BLOCK_ROWS, generate_block
from hf_gradtools.gradmem.training.options import TrainOptions


__all__ = ["FreshRows", "ShuffledRows", "Stage", "build_stages", "load_stage", "seen_contexts"]

MOST_COMPARED = 200_000  # training rows of which contexts are compared with those of validation
Rows = list[dict[str, Any]]


class RowSource(Protocol):
    """Training rows by number, without an end."""

    def rows(self, numbers: Sequence[int]) -> Rows: ...


@dataclass(frozen=True)
class FreshRows:
    """Rows of a task that are generated when they are asked for; one is there twice by chance alone.

    Args:
        config (`KVRetrievalConfig`): the task; if it tells a size, the rows begin anew after so many.
        seed (`int`): of the rows.
        split (`str`, defaults to `"train"`): "train" or "valid".
    """

    config: KVRetrievalConfig
    seed: int
    split: str = "train"

    def rows(self, numbers: Sequence[int]) -> Rows:
        return [self._row(int(n) if self.config.size is None else int(n) % self.config.size) for n in numbers]

    def _row(self, number: int) -> dict[str, Any]:
        columns = _block(self.config, self.seed, number // BLOCK_ROWS, self.split)
        return {name: values[number % BLOCK_ROWS] for name, values in columns.items()}


_block = lru_cache(maxsize=8)(generate_block)


class ShuffledRows:
    """Rows of a dataset, shuffled anew in each pass.

    Args:
        dataset (`datasets.Dataset`): the rows.
        seed (`int`): of their order.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def rows(self, numbers: Sequence[int]) -> Rows:
        return self.dataset.select([self._row(int(n)) for n in numbers]).to_list()

    def _row(self, number: int) -> int:
        a_pass, place = divmod(number, len(self.dataset))
        if self._order[0] != a_pass:
            self._order = (a_pass, np.random.default_rng([self.seed, a_pass]).permutation(len(self.dataset)))
        return int(self._order[1][place])


@dataclass(frozen=True)
class Stage:
    """What a run learns until it goes on to the next stage, or ends.

    Attributes:
        name: of the task.
        train: training rows by number.
        valid: validation rows.
        num_pairs: pairs in a context.
        alphabet: symbols that keys and values are made of.
        chance: exact match of a guess.
    """

    name: str
    train: RowSource
    valid: Dataset
    num_pairs: int
    alphabet: int
    chance: float


def build_stages(options: TrainOptions) -> list[Stage]:
    """The stages of a run: that of `data_path`, or one for each number of pairs of the curriculum.

    Raises:
        ValueError: there are no such rows.
    """
    sources = [_with_pairs(options.data_path, level) for level in options.levels] or [options.data_path]
    stages = [load_stage(source, options.seed, options.eval_rows) for source in sources]
    alphabets = {stage.alphabet for stage in stages}
    if len(alphabets) > 1:
        raise ValueError(f"curriculum_levels={options.curriculum_levels!r} have alphabets {alphabets}; one is needed.")
    fewest = min(stage.num_pairs for stage in stages)
    if options.queries_per_context > fewest:
        raise ValueError(
            f"queries_per_context={options.queries_per_context}, and contexts have {fewest} pairs. Ask for fewer."
        )
    return stages


def _with_pairs(data_path: str, pairs: int) -> str:
    """The task or folder of the same name with another number of pairs."""
    path = Path(data_path)
    name, count = re.subn(r"^N\d+", f"N{pairs}", path.name)
    if not count:
        raise ValueError(
            f"data_path={data_path!r} does not say the number of pairs, as in N2-K1V1-V4; curriculum_levels needs it."
        )
    return str(path.with_name(name))


def load_stage(data_path: str, seed: int, eval_rows: int) -> Stage:
    """The rows of a task by name, or of a folder.

    Args:
        data_path (`str`): see [`~hf_gradtools.gradmem.training.TrainOptions`].
        seed (`int`): of generated rows, and of the order.
        eval_rows (`int`): validation rows.

    Raises:
        ValueError: it is neither.
    """
    path = Path(data_path)
    if path.is_dir():
        return _stored_stage(path, seed, eval_rows)
    try:
        config = KVRetrievalConfig.from_name(data_path)
    except ValueError as error:
        raise ValueError(f"data_path={data_path!r} is no folder, and no task: {error}") from error
    valid = FreshRows(config, seed, "valid").rows(range(eval_rows))
    return _stage(config, FreshRows(config, seed), Dataset.from_list(valid))


def _stage(config: KVRetrievalConfig, train: RowSource, valid: Dataset) -> Stage:
    chance = config.vocab_size ** -float(config.value_length)
    return Stage(config.with_size(None).name, train, valid, config.num_pairs, config.vocab_size, chance)


def _stored_stage(path: Path, seed: int, eval_rows: int) -> Stage:
    """The splits "train" and "valid" of a folder, whose name tells the task."""
    try:
        config, splits = KVRetrievalConfig.from_name(path.name), load_from_disk(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data_path={str(path)!r}: {str(error).rstrip('.')}. Pass a folder made by `hf-gradtools gradmem data`, "
            "and named as its task."
        ) from error
    if not isinstance(splits, DatasetDict) or not {"train", "valid"} <= set(splits):
        raise ValueError(f"data_path={str(path)!r} needs the splits train and valid; `gradmem data` makes them.")
    valid = splits["valid"]
    return _stage(config, ShuffledRows(splits["train"], seed), valid.select(range(min(eval_rows, len(valid)))))


def seen_contexts(stage: Stage, trained_rows: int) -> float:
    """Share of a stage's validation contexts that are among those of its first `trained_rows` training rows.

    Where there are few different contexts, training sees most of them: exact match then tells of storing and
    retrieving, not of contexts that are new. No more than the first 200,000 training rows are compared.
    """
    wanted = set(stage.valid["context"])
    count = min(trained_rows, MOST_COMPARED)
    seen: set[str] = set()
    for begin in range(0, count, BLOCK_ROWS):
        rows = stage.train.rows(range(begin, min(begin + BLOCK_ROWS, count)))
        seen |= wanted & {row["context"] for row in rows}
    return sum(context in seen for context in stage.valid["context"]) / len(stage.valid)
