"""The examples of projected gradients run offline, on tiny models and data."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest


EXAMPLES = Path(__file__).parents[1] / "examples" / "ghost"


@pytest.fixture
def run(monkeypatch, capsys, datasets_cache):
    """Runs an example in this process, which has imported what they all need, and returns what it prints."""

    def run(script, *args):
        path = EXAMPLES / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        monkeypatch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def write_rows(path, letters, count=24):
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(list(letters), 12))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", "abcdefghij")


def test_mlp_whole_gradients_are_exact(run):
    output = run("ghost_gradproj_mlp.py", "--mode", "exact", "--num_samples", 40, "--num_queries", 5)
    assert "707 of 707 numbers" in output
    assert "correlation 1.0000" in output
    assert "stored ones find 100%" in output


def test_lm_shows_the_nearest_samples(run, corpus, tiny_model):
    text = json.loads(corpus.read_text().splitlines()[3])["text"]
    sizes = ["--proj_rank_total", 64, "--proj_layers", "v_proj,up_proj", "--query", text]
    output = run("ghost_gradproj_lm.py", "--model", tiny_model, "--dataset", corpus, *sizes)
    assert "24 samples, 64 numbers each for" in output
    assert output.splitlines()[-5].startswith(f"  +1.000  {text}")  # itself


def test_error_against_dimension_is_a_table_and_a_plot(run, corpus, tiny_model, tmp_path):
    sizes = ["--block_size", 16, "--max_samples", 12, "--num_queries", 4, "--dims", 64, 2048]
    run("gradproj_lm/plot_error.py", "--model", tiny_model, "--dataset", corpus, "--output_dir", tmp_path, *sizes)
    with open(tmp_path / "error.csv") as file:
        table = list(csv.DictReader(file))
    errors = [float(line["relative_error"]) for line in table if line["form"] == "two stages"]
    assert errors[1] < errors[0] < 1
    pytest.importorskip("matplotlib")
    assert (tmp_path / "error.png").stat().st_size > 1000


def test_projecting_a_corpus_goes_on_with_the_same_command(run, corpus, tiny_model, tmp_path):
    command = ["--model", tiny_model, "--dataset", corpus, "--block_size", 16, "--output_dir", tmp_path / "out"]
    assert "nearest to sample 0:\n  +1.000      0" in run("gradproj_lm/project.py", *command, "--proj_rank_total", 64)
    assert (tmp_path / "out" / "samples.jsonl").exists()


def test_selected_rows_are_of_the_target_domain(run, tiny_model, tmp_path):
    domains = [
        f"left={write_rows(tmp_path / 'l.jsonl', 'abc', 40)}",
        f"right={write_rows(tmp_path / 'r.jsonl', 'ghij')}",
    ]
    sizes = ["--rows_per_domain", 20, "--target_rows", 6, "--test_rows", 6, "--fraction", 0.2, "--epochs", 1]
    choices = ["--target", "left", "--seeds", 1, "--proj_rank_total", 64]
    output = run("select_data.py", "--model", tiny_model, "--corpus", *domains, *sizes, *choices)
    assert "selected 8 rows of 40: 8 left" in output
    assert "after a random 20%" in output
