"""What runs measured: YAML documents with the seed's fields, and a table."""

from __future__ import annotations

import functools
import json
import math
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.search.reading import as_yaml
from hf_gradtools.nanogpt.search.run_queue import COMPLETE, Outcome, RunQueue


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["METRICS", "result_documents", "results_table", "write_results"]

METRICS = (
    "best_val_loss",
    "best_val_iter",
    "num_params",
    "better_than_chance",
    "btc_per_param",
    "peak_gpu_mb",
    "iter_latency_avg",
)
RESULTS = "results.yaml"


def result_documents(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One document for each settled run; what a run did not measure is NaN.

    Args:
        outcomes (`Iterable[Outcome]`): of [`~hf_gradtools.nanogpt.search.run_queue.RunQueue.outcomes`].

    Returns:
        `list[dict]`: `formatted_name`, `config`, the metrics, `status`, `attempts`, `out_dir`, and `error` of one that
            failed.
    """
    documents = []
    for outcome in outcomes:
        if outcome.settled:
            further = {name: value for name, value in outcome.metrics.items() if name not in METRICS}
            documents.append(
                {
                    "formatted_name": outcome.run.name,
                    "config": outcome.run.config,
                    **{name: outcome.metrics.get(name, math.nan) for name in METRICS},
                    **further,
                    "status": outcome.status,
                    "attempts": outcome.attempt + 1,
                    "out_dir": outcome.folder,
                    **({} if outcome.error is None else {"error": dict(outcome.error)}),
                }
            )
    return documents


def write_results(queue: RunQueue) -> None:
    """Writes `results.yaml` into the folder of a queue, whole or not at all, with all that is settled by then."""
    written: list[str] | None = None
    while (documents := [json.dumps(each) for each in result_documents(queue.outcomes().values())]) != written:
        with atomic_write(queue.folder / RESULTS, tmp_suffix=f".{uuid.uuid4().hex}.tmp") as file:
            file.write("".join(map(_as_yaml, documents)).encode())
        written = (
            documents  # another worker may have put an older state in its place: it looks again, as this one does
        )


@functools.lru_cache(maxsize=100_000)
def _as_yaml(document: str) -> str:
    """A settled run never changes, and PyYAML needs milliseconds for each."""
    return as_yaml(json.loads(document), explicit_start=True)


def results_table(folder: str | Path, storage: Any = None) -> Dataset:
    """The settled runs of a sweep as a table, one column for each metric and each flag.

    Args:
        folder (`str` or `Path`): of the sweep.
        storage (*optional*): as given to the sweep.

    Returns:
        `datasets.Dataset`: `formatted_name`, `status`, `error`, the metrics (None where not measured), the flags. A
        flag whose values have several types, or are lists, is a column of JSON.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from datasets import Dataset

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with the runs of a sweep.")
    outcomes = [outcome for outcome in RunQueue(folder, storage).outcomes().values() if outcome.settled]
    columns: dict[str, list[Any]] = {
        "formatted_name": [outcome.run.name for outcome in outcomes],
        "status": [outcome.status for outcome in outcomes],
        "error": [outcome.error and f"{outcome.error['type']}: {outcome.error['message']}" for outcome in outcomes],
        "out_dir": [outcome.folder for outcome in outcomes],
    }
    measured = dict.fromkeys([*METRICS, *(name for outcome in outcomes for name in outcome.metrics)])
    for name in measured:
        columns[name] = [outcome.metrics.get(name) if outcome.status == COMPLETE else None for outcome in outcomes]
    for flag in dict.fromkeys(flag for outcome in outcomes for flag in outcome.run.config):
        column = flag if flag not in columns else f"config.{flag}"
        columns[column] = _uniform([outcome.run.config.get(flag) for outcome in outcomes])
    return Dataset.from_dict(columns)


def _uniform(values: Sequence[Any]) -> list[Any]:
    """A column that Arrow takes: values of one type, or JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else max(kinds, key=lambda kind: kind is float)(value) for value in values]
    if len(kinds) == 1 and kinds <= {bool, str}:
        return list(values)
    return [None if value is None else json.dumps(value) for value in values]
