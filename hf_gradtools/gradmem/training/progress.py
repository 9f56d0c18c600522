"""Where a run stands, read off its log. Trainer keeps the log in every checkpoint, so a resumed run stands there too.

An evaluation's row of the log has `step`, `eval_stage`, `eval_exact_match` and `eval_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


__all__ = ["best_evaluation", "current_stage", "evaluations", "evaluations_since_best", "is_over"]

Row = dict[str, Any]


def evaluations(history: Sequence[Row]) -> list[Row]:
    """The rows of evaluations, in the order of time."""
    return [row for row in history if "eval_exact_match" in row]


def current_stage(history: Sequence[Row], threshold: float, stages: int) -> int:
    """Number of the curriculum's stage, counted from 0: one further than evaluated if that one was learned.

    Args:
        history (`Sequence[dict]`): the run's log.
        threshold (`float`): exact match at which a stage is learned.
        stages (`int`): how many there are; the last one does not end.
    """
    last = next((row for row in reversed(history) if "eval_exact_match" in row), None)
    if last is None:
        return 0
    return min(last["eval_stage"] + int(last["eval_exact_match"] >= threshold), stages - 1)


def best_evaluation(history: Sequence[Row]) -> Row | None:
    """The evaluation of the latest stage with the highest exact match; of equals the lowest loss, then the first."""
    return max(
        evaluations(history),
        key=lambda row: (row["eval_stage"], row["eval_exact_match"], -row["eval_loss"]),
        default=None,
    )


def evaluations_since_best(history: Sequence[Row]) -> int:
    """How many evaluations in a row, up to now, were no better than the best of their stage."""
    best = best_evaluation(history)
    return 0 if best is None else sum(row["step"] > best["step"] for row in evaluations(history))


def is_over(history: Sequence[Row], stages: int, stop_at: float, patience: int | None) -> bool:
    """Whether the last stage is learned to `stop_at`, or the best evaluation is `patience` evaluations ago."""
    done = evaluations(history)
    if not done:
        return False
    learned = done[-1]["eval_stage"] == stages - 1 and done[-1]["eval_exact_match"] >= stop_at
    return learned or (patience is not None and evaluations_since_best(history) >= patience)
