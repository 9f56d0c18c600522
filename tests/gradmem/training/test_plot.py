"""Tables of results and of costs."""

from __future__ import annotations

import pytest

from hf_gradtools.gradmem.training.costs import AnswerCosts
from hf_gradtools.gradmem.training.plot import accuracy_table, cost_table
from hf_gradtools.gradmem.training.results import read_results


def result(value, num_pairs=2, **more):
    base = {"vanilla": False, "grad_mode": "second", "K": 1, "task": "", "num_pairs": num_pairs}
    return {**base, "metrics": {"exact_match": value}, **more}


def test_a_table_has_means_and_extremes_of_seeds():
    results = [result(0.25), result(0.75), result(1.0, 4, K=2), result(0.5, 4, vanilla=True)]
    assert accuracy_table(results) == (
        "|  | N=2 | N=4 |\n| --- | ---: | ---: |\n| vanilla |  | 0.500 |\n"
        "| second, K=1 | 0.500 (0.250–0.750, 2 seeds) |  |\n| second, K=2 |  | 1.000 |"
    )
    with pytest.raises(ValueError, match="metric='bleu' is none of exact_match"):
        accuracy_table(results, "bleu")


def test_a_table_of_costs_has_the_crossings():
    costs = {64: AnswerCosts(write=100_000_000, read=1_000_000, prompt=26_000_000, context=2, cached=1_000_000)}
    row = cost_table(costs, [1, 4]).splitlines()[-1]
    assert row == "| 64 | 101.0 | 26.0 | 26.0 | 5 queries | never |"


def test_files_of_several_results_are_read(tmp_path):
    import json

    lines = [json.dumps(result(value)) for value in (0.1, 0.2)]
    (tmp_path / "cells.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "list.json").write_text(f"[{lines[0]}]")
    (tmp_path / "results.json").write_text(lines[1])
    found = read_results([str(tmp_path / name) for name in ("cells.jsonl", "list.json", "")])
    assert [one["metrics"]["exact_match"] for one in found] == [0.1, 0.2, 0.1, 0.2]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no result"):
        read_results([str(tmp_path / "other.json")])
