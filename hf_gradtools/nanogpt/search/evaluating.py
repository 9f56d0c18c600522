"""Candidates of a search as runs of a pool, and their runs as scores and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_gradtools.nanogpt.search.candidates import Candidate
from hf_gradtools.nanogpt.search.choosing import Comparison, Measured
from hf_gradtools.nanogpt.search.costs import HARDWARE_COSTS, ReportFn, measured_cost, reported_cost
from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.pool import Pool
from hf_gradtools.nanogpt.search.results import METRICS
from hf_gradtools.nanogpt.search.run_queue import COMPLETE, OBJECTIVE, Outcome


__all__ = ["Evaluated", "Evaluator"]

SEED, FIRST_SEED = "seed", 1337
BASELINE = "baseline"


@dataclass(frozen=True)
class Evaluated:
    """A candidate and what its runs measured.

    Args:
        candidate: the configuration.
        measured: None if it failed.
        runs: by seed; empty if it was refused before it ran.
        error: why it failed.
    """

    candidate: Candidate
    measured: Measured | None
    runs: Mapping[int, Outcome]
    error: Mapping[str, str] | None = None

    def means(self) -> dict[str, float]:
        """Metrics averaged over seeds."""
        complete = [run.metrics for run in self.runs.values()]
        names = [name for name in METRICS if complete and all(name in metrics for metrics in complete)]
        return {name: statistics.fmean(metrics[name] for metrics in complete) for name in names}

    def metrics_document(self) -> dict[str, Any]:
        """What the results file says of a baseline."""
        means = self.means()
        return {
            "loss": _loss(self.measured),
            "score": self.measured.score,
            "params": means.get("num_params"),
            "peak_gpu_mb": means.get("peak_gpu_mb"),
            "iter_latency_avg": means.get("iter_latency_avg"),
            "best_iter": means.get("best_val_iter"),
            "cost": self.measured.cost,
        }

    def candidate_document(self, comparison: Comparison | None) -> dict[str, Any]:
        """What the results file says of a candidate."""
        document: dict[str, Any] = {"param": self.candidate.param, "value": self.candidate.value}
        if self.measured is None or comparison is None:
            return {**document, "error": dict(self.error or {})}
        loss = _loss(self.measured)
        return {
            **document,
            "avg_loss": loss,
            "avg_score": self.measured.score,
            **self.means(),
            OBJECTIVE: loss,
            "cost": self.measured.cost,
            "delta_score": comparison.gain,
            "standard_error": comparison.standard_error,
            "delta_cost": comparison.cost,
            "efficiency": comparison.efficiency,
            "seeds": [
                {"seed": seed, "loss": run.metrics[OBJECTIVE], "out_dir": run.folder}
                for seed, run in self.runs.items()
            ],
        }


def _loss(measured: Measured) -> float:
    """The loss of the mean score."""
    return -math.log(measured.score) if measured.score > 0 else math.inf


class Evaluator:
    """Runs configurations with several seeds.

    Args:
        pool (`Pool`): runs them.
        target (`str`): what they cost in.
        seeds (`int`): runs of each configuration.
        report (`ReportFn`, *optional*): of a configuration's hardware.
        group (`str`): tag of the search's runs.
        retry_failed (`bool`): tries again what failed before this start.
    """

    def __init__(
        self, pool: Pool, target: str, seeds: int, report: ReportFn | None, group: str, retry_failed: bool
    ) -> None:
        self.pool = pool
        self.target = target
        self.seeds = seeds
        self.report = report
        self.group = group
        self.retry_failed = retry_failed
        self._retried: set[str] = set()

    def baseline(self, config: dict[str, Any]) -> Evaluated:
        """Measures a configuration that must not fail.

        Raises:
            RuntimeError: it failed.
        """
        evaluated = self.round(-1, [Candidate(BASELINE, None, config)])[0]
        if evaluated.measured is None:
            error = evaluated.error or {}
            raise RuntimeError(
                f"the baseline failed ({error.get('type')}: {error.get('message')}), and there is nothing to compare "
                "candidates with. Correct orig_settings, or pass retry_failed=True."
            )
        return evaluated

    def round(self, number: int, candidates: Sequence[Candidate]) -> list[Evaluated]:
        """Measures candidates, all runs of them at once."""
        costs = [self._reported(candidate) for candidate in candidates]
        runs = {
            index: self._runs(number, candidate)
            for index, (candidate, cost) in enumerate(zip(candidates, costs, strict=True))
            if not isinstance(cost, Mapping)
        }
        flat = [run for each in runs.values() for run in each.values()]
        outcomes = self._settle(flat)
        evaluated = []
        for index, (candidate, cost) in enumerate(zip(candidates, costs, strict=True)):
            if isinstance(cost, Mapping):
                evaluated.append(Evaluated(candidate, None, {}, cost))
            else:
                settled = {seed: outcomes[run.key] for seed, run in runs[index].items()}
                evaluated.append(self._evaluated(candidate, settled, cost))
        return evaluated

    def _settle(self, runs: Sequence[Run]) -> dict[str, Outcome]:
        # Each failure is tried again once, not in every round in which the configuration comes up.
        new = {run.key for run in runs} - self._retried
        self._retried |= new
        again = [run for run in runs if run.key in new] if self.retry_failed else []
        if again:
            self.pool.queue().enqueue(again, retry_failed=True)
        return self.pool.settle(runs, group=self.group) if runs else {}

    def _runs(self, number: int, candidate: Candidate) -> dict[int, Run]:
        given = candidate.config.get(SEED)
        first = FIRST_SEED if given is None else int(given)
        label = BASELINE if number < 0 else f"round{number}-{candidate.param}={candidate.value}"
        tags = {"group": self.group, "round": number, "param": candidate.param}
        return {
            seed: Run({**candidate.config, SEED: seed}, f"{label}-seed{seed}", tags)
            for seed in range(first, first + self.seeds)
        }

    def _reported(self, candidate: Candidate) -> float | Mapping[str, str] | None:
        """The cost that needs no run; None if one is needed, an error if the configuration is refused."""
        if self.target not in HARDWARE_COSTS or self.report is None:
            return None
        try:
            return reported_cost(self.target, self.report(candidate.config))
        except Exception as error:  # whatever a configuration is refused with
            return _refused(error)

    def _evaluated(self, candidate: Candidate, runs: Mapping[int, Outcome], cost: float | None) -> Evaluated:
        failed = [run for run in runs.values() if run.status != COMPLETE]
        if failed:
            return Evaluated(candidate, None, runs, failed[0].error)
        try:
            if cost is None:
                cost = statistics.fmean(measured_cost(self.target, run.metrics) for run in runs.values())
            scores = tuple(_score(run.metrics[OBJECTIVE]) for run in runs.values())
        except ValueError as error:  # its runs are complete, and cannot be compared
            return Evaluated(candidate, None, runs, _refused(error))
        return Evaluated(candidate, Measured(scores, float(cost)), runs)


def _score(loss: float) -> float:
    if score := math.exp(-loss):
        return score
    raise ValueError(f"the loss {loss:g} is too large to tell e^-loss from 0.")


def _refused(error: Exception) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error), "traceback": ""}
