"""Runs of a folder as trials of one study: enqueued once, taken once, tried again if their worker died.

A trial is one attempt at one configuration. The lowest number among trials of the same configuration and attempt is
the attempt itself; any other was enqueued by a second machine at the same moment, and is set aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.liveness import STALE_SECONDS, Watch, Worker
from hf_gradtools.nanogpt.search.storage import import_optuna, open_study


__all__ = ["Attempt", "Outcome", "RunQueue"]

logger = logging.get_logger(__name__)

OBJECTIVE = "best_val_loss"
WAITING, RUNNING, COMPLETE, FAILED, LOST = "waiting", "running", "complete", "failed", "lost"


@dataclass(frozen=True)
class Outcome:
    """Where a run stands, by its latest attempt.

    Args:
        run: the configuration.
        status: "waiting", "running", "complete", "failed", or "lost" with its worker.
        metrics: what it measured, if complete.
        error: `type`, `message` and `traceback`, if failed.
        attempt: counted from 0.
        folder: of the attempt's files.
        number: of its trial.
        died: whether it ended with the process that ran it in its own memory.
    """

    run: Run
    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    attempt: int = 0
    folder: str | None = None
    number: int = -1
    died: bool = False

    @property
    def settled(self) -> bool:
        return self.status in (COMPLETE, FAILED)


@dataclass(frozen=True)
class Attempt:
    """A run that this worker has taken.

    Args:
        run: the configuration.
        number: of the attempt, from 0.
        trial: Optuna's.
        earlier: the attempts before.
    """

    run: Run
    number: int
    trial: Any
    earlier: tuple[Outcome, ...]


class RunQueue:
    """The runs of a folder and what became of them.

    Args:
        folder (`Path`): holds the journal and the workers' heartbeats.
        storage (`str` or `optuna.storages.BaseStorage`, *optional*): instead of the journal.
        stale_seconds (`float`, defaults to 60): see [`~hf_gradtools.nanogpt.search.liveness.Watch`].
    """

    def __init__(self, folder: Path, storage: Any = None, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder = folder
        self.study = open_study(folder, storage)
        self.watch = Watch(folder, stale_seconds)
        self._states = import_optuna().trial.TrialState
        self._finished = import_optuna().exceptions.UpdateFinishedTrialError

    def attempts(self) -> dict[str, list[Outcome]]:
        """All attempts by key of the configuration, earliest first."""
        attempts: dict[str, dict[int, Outcome]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if "key" in trial.user_attrs:
                outcome = self._outcome(trial)
                attempts.setdefault(trial.user_attrs["key"], {}).setdefault(outcome.attempt, outcome)
        return {key: [by_number[n] for n in sorted(by_number)] for key, by_number in attempts.items()}

    def outcomes(self) -> dict[str, Outcome]:
        """The latest attempt by key of the configuration, in the order in which runs were enqueued first."""
        return {key: attempts[-1] for key, attempts in self.attempts().items()}

    def enqueue(self, runs: Iterable[Run], *, retry_failed: bool = False) -> None:
        """Sees to it that every run is waiting, running or settled.

        Args:
            runs (`Iterable[Run]`): their configurations.
            retry_failed (`bool`, defaults to `False`): those that failed are to be tried again.
        """
        outcomes = self.outcomes()
        for run in runs:
            outcome = outcomes.get(run.key)
            if outcome is None:
                self._add(run, 0)
            elif outcome.status == LOST or (outcome.status == FAILED and retry_failed):
                self._add(run, outcome.attempt + 1)

    def take(self, worker: Worker, keys: set[str], group: str | None = None, **signed: Any) -> Attempt | None:
        """The next run that waits, which is this worker's from now on; None if none does.

        Args:
            worker (`Worker`): this process.
            keys (`set[str]`): of the configurations that are asked for now; another that waits is set aside.
            group (`str`, *optional*): runs tagged with it are asked for too.
            **signed: kept with the attempt.
        """
        while self._any_waits():
            with worker.asking():
                trial = self.study.ask()
                key = trial.user_attrs.get("key")
                if key is None:  # the last one that waited was taken at this moment, and Optuna made a new one
                    self._tell(trial.number, self._states.FAIL)
                    continue
                attempts = self.attempts()[key]
                own = next((attempt for attempt in attempts if attempt.number == trial.number), None)
                wanted = key in keys or (group is not None and trial.user_attrs["tags"].get("group") == group)
                if own is None or not wanted:
                    self._tell(trial.number, self._states.PRUNED)
                    continue
                trial.set_user_attr("worker", {**worker.about, **signed})
            earlier = tuple(attempt for attempt in attempts if attempt.attempt < own.attempt)
            return Attempt(own.run, own.attempt, trial, earlier)
        return None

    def complete(self, attempt: Attempt, metrics: Mapping[str, float], folder: Path) -> bool:
        """Records what a run measured; False if it was given up in the meantime, and runs elsewhere."""
        attributes = {"metrics": dict(metrics), "folder": str(folder)}
        return self._finish(attempt, attributes, self._states.COMPLETE, float(metrics[OBJECTIVE]))

    def fail(self, attempt: Attempt, error: Mapping[str, str], folder: Path) -> bool:
        """Records why a run failed; False if it was given up in the meantime."""
        return self._finish(attempt, {"error": dict(error), "folder": str(folder)}, self._states.FAIL)

    def release(self, attempt: Attempt) -> None:
        """Gives a run back, to be tried again."""
        self._finish(attempt, {"released": True}, self._states.FAIL)

    def reap(self, *, only_here: bool = False) -> None:
        """Gives back the runs of workers that have died.

        Args:
            only_here (`bool`, defaults to `False`): takes all workers of other machines for dead.
        """
        unsigned = []
        for trial in self._running():
            about = trial.user_attrs.get("worker")
            if about is None:
                unsigned.append(trial.number)
            elif not self.watch.is_alive(about, only_here=only_here):
                logger.warning(f"{self._told(trial)} is tried again: its worker on {about['machine']} has died.")
                self._tell(trial.number, self._states.FAIL)
        if unsigned and not self.watch.anyone_asking(only_here=only_here):
            for trial in self._running():  # again: one may have been signed while it was looked who asks
                if trial.number in unsigned and "worker" not in trial.user_attrs:
                    self._tell(trial.number, self._states.FAIL)

    def _running(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,))

    def _any_waits(self) -> bool:
        return bool(self.study.get_trials(deepcopy=False, states=(self._states.WAITING,)))

    def _add(self, run: Run, attempt: int) -> None:
        attributes = {"key": run.key, "attempt": attempt, "name": run.name, "config": run.config, "tags": run.tags}
        self.study.enqueue_trial(run.config, user_attrs=attributes)

    def _outcome(self, trial: Any) -> Outcome:
        kept, states = trial.user_attrs, self._states
        ended = FAILED if "error" in kept else LOST
        return Outcome(
            run=Run(kept["config"], kept["name"], kept["tags"]),
            status={states.WAITING: WAITING, states.RUNNING: RUNNING, states.COMPLETE: COMPLETE}.get(
                trial.state, ended
            ),
            metrics=kept.get("metrics", {}),
            error=kept.get("error"),
            attempt=kept["attempt"],
            folder=kept.get("folder"),
            number=trial.number,
            died=trial.state == states.FAIL
            and not kept.keys() & {"error", "released"}
            and bool(kept.get("worker", {}).get("in_process")),
        )

    def _finish(self, attempt: Attempt, attributes: Mapping[str, Any], state: Any, value: float | None = None) -> bool:
        try:
            for name, kept in attributes.items():
                attempt.trial.set_user_attr(name, kept)
            told = self._tell(attempt.trial.number, state, value)
        except self._finished:
            told = False
        if not told:
            logger.warning(f"{attempt.run.name} was given up for dead while it ran; what it says now is left out.")
        return told

    def _tell(self, number: int, state: Any, value: float | None = None) -> bool:
        """Ends a trial; False if somebody has ended it before."""
        try:
            self.study.tell(number, value, state=state)
        except (self._finished, ValueError):
            if self.study.get_trials(deepcopy=False)[number].state.is_finished():
                return False
            raise
        return True

    def _told(self, trial: Any) -> str:
        return trial.user_attrs.get("name", f"Trial {trial.number}")
