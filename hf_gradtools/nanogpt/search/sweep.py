"""All runs of an exploration, each once, on any number of workers and machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_gradtools.nanogpt.search.execute import RunFn
from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.pool import Pool
from hf_gradtools.nanogpt.search.results import write_results
from hf_gradtools.nanogpt.search.run_queue import Outcome
from hf_gradtools.nanogpt.search.training_run import PRELOAD, train_run


__all__ = ["run_sweep"]

logger = logging.get_logger(__name__)


def run_sweep(
    runs: Sequence[Run | Mapping[str, Any]],
    folder: str | Path,
    run: RunFn | None = None,
    *,
    workers: int = 1,
    in_process: bool = False,
    retry_failed: bool = False,
    retry_stale: bool = False,
    storage: Any = None,
    progress: bool = False,
    **options: Any,
) -> list[Outcome]:
    """Runs every configuration once, and records what each measured, or why it failed.

    Started again, it goes on where it was, however it ended: runs of workers that were killed are run again, runs that
    are complete or failed are not. Started on other machines with the same folder, it shares the work.

    Args:
        runs (`Sequence[Run]` or of `dict`): of [`~hf_gradtools.nanogpt.search.exploration.read_exploration`], or
            plain configurations.
        folder (`str` or `Path`): gets the journal, `results.yaml`, and a folder for each run in `runs/`.
        run (`RunFn`, *optional*): called with the flags of a run and its folder; returns numbers, `best_val_loss`
            among them. Default [`~hf_gradtools.nanogpt.search.training_run.train_run`].
        workers (`int`, defaults to 1): runs at the same time on this machine.
        in_process (`bool`, defaults to `False`): a run shares its worker's process. It starts seconds faster; a run
            that crashes takes its worker along, and counts as failed after three workers.
        retry_failed (`bool`, defaults to `False`): runs that failed are run again.
        retry_stale (`bool`, defaults to `False`): takes from other machines the runs that they hold; without it that
            happens when such a worker has been silent for a minute.
        storage (*optional*): an Optuna storage or its URL, instead of the journal.
        progress (`bool`, defaults to `False`): shows a bar.
        **options: of [`~hf_gradtools.nanogpt.search.pool.Pool`].

    Returns:
        `list[Outcome]`: in the order of `runs`, each complete or failed.

    Raises:
        ValueError: there is no run.
    """
    named = [each if isinstance(each, Run) else _named(each) for each in runs]
    if not named:
        raise ValueError("runs is empty. Pass at least one configuration.")
    if run is None:
        run, options = train_run, {"preload": PRELOAD, **options}
    pool = Pool(
        run,
        Path(folder),
        workers=workers,
        in_process=in_process,
        storage=storage,
        progress=progress,
        on_finish=write_results,
        **options,
    )
    _tell_of_others(pool, named)
    outcomes = pool.settle(named, retry_failed=retry_failed, retry_stale=retry_stale)
    write_results(pool.queue())
    return [replace(outcomes[each.key], run=each) for each in named]


def _named(config: Mapping[str, Any]) -> Run:
    return Run(dict(config), "-".join(str(value) for value in config.values()) or "default")


def _tell_of_others(pool: Pool, runs: Sequence[Run]) -> None:
    others = pool.queue().outcomes().keys() - {run.key for run in runs}
    if others:
        logger.warning(
            f"{pool.folder} holds {len(others)} runs that are not asked for now; those that wait are set aside."
        )
