"""Workers that take runs from a queue until all are settled."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from hf_gradtools.nanogpt.search.execute import RunFn, die_with_parent, execute
from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.liveness import STALE_SECONDS, Worker
from hf_gradtools.nanogpt.search.run_queue import Attempt, Outcome, RunQueue


__all__ = ["Pool"]

logger = logging.get_logger(__name__)

RUNS = "runs"
FIRST_POLL_SECONDS, POLL_SECONDS = 0.05, 1.0  # between looks at a queue in which others are at work
SUPERVISE_SECONDS = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"
RESTARTS = 5  # of workers that die, for every one that was asked for


@dataclass(frozen=True)
class Pool:
    """How runs are run.

    Args:
        run (`RunFn`): runs one configuration; importable by name if it leaves this process.
        folder (`Path`): of the journal and of the runs; any number of pools, on any machines that share the folder,
            work together.
        workers (`int`, defaults to 1): runs at the same time.
        gpus (`tuple[str, ...]`): each of several workers sees one of them, in turn; default those that
            CUDA_VISIBLE_DEVICES lists.
        preload (`tuple[str, ...]`): modules that the processes of runs begin with. None of them may start CUDA.
        in_process (`bool`, defaults to `False`): a run shares its worker's process; with several workers, or to
            survive crashes, it has its own.
        storage (`str` or `optuna.storages.BaseStorage`, *optional*): instead of the journal.
        stale_seconds (`float`, defaults to 60): after which a silent worker of another machine is dead.
        on_finish (`Callable[[RunQueue], None]`, *optional*): called after each run, by its worker.
        progress (`bool`, defaults to `False`): shows a bar.

    Raises:
        ValueError: `workers` is below 1, `run` cannot be imported by another process, or several workers share a
            storage that hands one run to two of them.
    """

    run: RunFn
    folder: Path
    workers: int = 1
    gpus: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    in_process: bool = False
    storage: Any = None
    stale_seconds: float = STALE_SECONDS
    on_finish: Callable[[RunQueue], None] | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1.")
        if self.workers > 1 or not self.in_process:
            _check_importable(self.run)
        if self.workers > 1 and self.storage is not None and not _shared(self.storage):
            raise ValueError(
                f"storage={self.storage!r} cannot serve workers={self.workers}: SQLite hands one run to two workers, "
                "and memory is not shared. Leave storage out, for a journal, or pass workers=1."
            )

    def queue(self) -> RunQueue:
        """The runs of the folder."""
        return RunQueue(self.folder, self.storage, self.stale_seconds)

    def settle(
        self, runs: Sequence[Run], *, group: str | None = None, retry_failed: bool = False, retry_stale: bool = False
    ) -> dict[str, Outcome]:
        """Runs what is not settled yet, together with all others who do so on the same folder.

        Args:
            runs (`Sequence[Run]`): configurations; one that has been run is not run again.
            group (`str`, *optional*): runs with this tag are taken, too, that somebody else has enqueued.
            retry_failed (`bool`, defaults to `False`): tries those that failed again.
            retry_stale (`bool`, defaults to `False`): takes workers of other machines for dead, so that what they
                left is run at once.

        Returns:
            `dict[str, Outcome]`: by key of the configuration, each complete or failed.
        """
        queue = self.queue()
        queue.reap(only_here=retry_stale)
        queue.enqueue(runs, retry_failed=retry_failed)
        with tqdm(total=len({run.key for run in runs}), disable=not self.progress, unit="run") as bar:
            if self.workers == 1:
                self._work(queue, runs, group, bar)
            else:
                self._supervise(queue, runs, group, bar)
        outcomes = queue.outcomes()
        return {run.key: outcomes[run.key] for run in runs}

    def _work(self, queue: RunQueue, runs: Sequence[Run], group: str | None, bar: Any = None) -> None:
        """Takes runs until all are settled, those of dead workers among them."""
        keys = {run.key for run in runs}
        pause = FIRST_POLL_SECONDS
        with Worker(self.folder) as worker:
            while not _settled(queue, keys, bar):
                queue.reap()
                queue.enqueue(runs)
                if (attempt := queue.take(worker, keys, group, in_process=self.in_process)) is None:
                    time.sleep(pause)
                    pause = min(2 * pause, POLL_SECONDS)
                else:
                    self._make(attempt, queue)
                    pause = FIRST_POLL_SECONDS

    def _make(self, attempt: Attempt, queue: RunQueue) -> None:
        try:
            root = self.folder / RUNS
            result, folder = execute(self.run, attempt, root, in_process=self.in_process, preload=self.preload)
        except BaseException:  # Ctrl-C among them: the run is tried again
            queue.release(attempt)
            raise
        if "metrics" in result:
            queue.complete(attempt, result["metrics"], folder)
        else:
            error = result["error"]
            logger.warning(f"{attempt.run.name} failed: {error['type']}: {error['message']}")
            queue.fail(attempt, error, folder)
        if self.on_finish is not None:
            self.on_finish(queue)

    def _supervise(self, queue: RunQueue, runs: Sequence[Run], group: str | None, bar: Any) -> None:
        """Keeps workers in processes of their own, and starts another for one that was killed."""
        context = multiprocessing.get_context("spawn")
        processes: list[Any] = []
        restarts = self.workers * RESTARTS
        keys = {run.key for run in runs}
        try:
            for index in range(min(self.workers, len(runs))):
                processes.append(_start(context, self, runs, group, index))
            while not _settled(queue, keys, bar):
                for index, process in enumerate(processes):
                    if process.exitcode is not None and process.exitcode > 0:
                        raise RuntimeError(
                            f"a worker ended with exit code {process.exitcode}; its error stands above."
                        )
                    if process.exitcode is not None and process.exitcode < 0:
                        restarts -= 1
                        if restarts < 0:
                            raise RuntimeError(f"{self.workers * RESTARTS + 1} workers were killed. Start it again.")
                        processes[index] = _start(context, self, runs, group, index)
                time.sleep(SUPERVISE_SECONDS)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _start(context: Any, pool: Pool, runs: Sequence[Run], group: str | None, index: int) -> Any:
    process = context.Process(target=_worker, args=(pool, runs, group, index))
    process.start()
    return process


def _worker(pool: Pool, runs: Sequence[Run], group: str | None, index: int) -> None:
    die_with_parent()
    if gpus := pool.gpus or _visible_gpus():
        os.environ[VISIBLE] = gpus[index % len(gpus)]
    pool._work(pool.queue(), runs, group)


def _visible_gpus() -> tuple[str, ...]:
    return tuple(gpu for gpu in os.environ.get(VISIBLE, "").split(",") if gpu)


def _settled(queue: RunQueue, keys: set[str], bar: Any = None) -> bool:
    outcomes = queue.outcomes()
    settled = sum(key in outcomes and outcomes[key].settled for key in keys)
    if bar is not None and settled != bar.n:
        bar.update(settled - bar.n)
    return settled == len(keys)


def _check_importable(run: RunFn) -> None:
    """ValueError if another process could not find a function."""
    try:
        pickle.dumps(run)  # of a function that is its name, which multiprocessing sends
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"run={run!r} cannot be imported by another process ({error}). Define it at the top of a module, or pass "
            "in_process=True with workers=1."
        ) from error


def _shared(storage: Any) -> bool:
    return isinstance(storage, str) and not storage.startswith("sqlite")
