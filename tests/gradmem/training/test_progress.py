"""Where a run stands, read off its log."""

from __future__ import annotations

import pytest

from hf_gradtools.gradmem.training.progress import best_evaluation, current_stage, evaluations_since_best, is_over


def log(*evaluations):
    rows = []
    for i, (stage, exact_match, loss) in enumerate(evaluations):
        rows.append({"step": 10 * i, "loss": 1.0})
        rows.append({"step": 10 * i, "eval_stage": stage, "eval_exact_match": exact_match, "eval_loss": loss})
    return rows


@pytest.mark.parametrize(
    ("evaluations", "stage"),
    [([], 0), ([(0, 0.94, 1)], 0), ([(0, 0.95, 1)], 1), ([(0, 0.96, 1), (1, 0.3, 2)], 1), ([(2, 1.0, 0)], 2)],
)
def test_a_stage_ends_when_it_is_learned(evaluations, stage):
    assert current_stage(log(*evaluations), 0.95, 3) == stage


def test_a_later_stage_is_better_then_exact_match_then_the_loss_then_the_first():
    assert best_evaluation([]) is None
    history = log((0, 0.99, 0.1), (1, 0.4, 0.5), (1, 0.4, 0.3), (1, 0.4, 0.3), (1, 0.2, 0.1))
    assert best_evaluation(history)["step"] == 20
    assert evaluations_since_best(history) == 2


def test_a_run_ends_at_its_aim_in_the_last_stage_or_when_patience_is_over():
    assert not is_over([], 2, 1.0, 1)
    assert not is_over(log((0, 1.0, 0)), 2, 1.0, 1)
    assert is_over(log((0, 1.0, 0), (1, 1.0, 0)), 2, 1.0, 1)
    stalled = log((0, 1.0, 0), (1, 0.5, 1), (1, 0.4, 1), (1, 0.5, 2))
    assert not is_over(stalled, 2, 1.0, 3)
    assert is_over(stalled, 2, 1.0, 2)
    assert not is_over(stalled, 2, 1.0, None)
