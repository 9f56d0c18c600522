"""The command line from data to figures; what is wrong is told in one line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.gradmem.training import train
from tests.gradmem.training.reference import column, options, words


EXAMPLES = Path(__file__).parents[3] / "examples" / "gradmem"


def invoke(*arguments):
    return CliRunner().invoke(app, ["gradmem", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder made by `gradmem data`, and runs on it: with a memory, and the baseline."""
    folder = tmp_path_factory.mktemp("cli")
    data = folder / "N2-K1V1-V4"
    made = invoke("data", "--name", data.name, "--num", 40, "--out", data)
    assert made.exit_code == 0, made.output
    changes = {"data_path": data, "eval_rows": 8}
    for name, more in (("memory", {}), ("vanilla", {"vanilla": True})):
        done = invoke("train", *words(folder / name, **changes, **more))
        assert done.exit_code == 0, done.output
        assert "exact match" in done.output
    return folder


def test_a_saved_model_is_evaluated_at_each_K(run):
    out = run / "eval.json"
    done = invoke(
        "eval", "--model", run / "memory", "--data_path", "N3-K1V1-V4", "--K", 0, 2, "--rows", 12, "--out", out
    )
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert [(r["K"], r["num_pairs"], r["rows"]) for r in results] == [(0, 3, 12), (2, 3, 12)]
    assert "inner_loss_2" in results[1]["metrics"]
    assert {"generated_exact_match", "exact_match", "token_accuracy"} <= results[0]["metrics"].keys()
    assert json.loads(done.stdout) == results
    again = invoke("eval", "--model", run / "vanilla", "--data_path", run / "N2-K1V1-V4", "--rows", 8)
    assert again.exit_code == 0, again.output
    trained = json.loads((run / "vanilla" / "results.json").read_text())
    assert json.loads(again.stdout)["metrics"]["loss"] == pytest.approx(trained["metrics"]["loss"], rel=1e-5)


def test_results_are_compared_in_a_table_and_a_figure(run):
    done = invoke("plot", "--results", run / "memory", run / "vanilla", "--out", run / "figures" / "accuracy.png")
    assert done.exit_code == 0, done.output
    assert "| vanilla |" in done.output
    assert "| second, K=1 |" in done.output
    assert (run / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_costs_are_compared_in_a_table_and_a_figure(run):
    out = run / "costs.svg"
    done = invoke(
        "plot", "--cost_of", run / "memory", "--lengths", 16, 4096, "--queries", 1, 8, "--cost_out", out
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if line.startswith("| 4,096 |")]
    assert len(rows) == 1
    assert "queries |" in rows[0]
    assert "<svg" in out.read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--exp_path", "x", "--grad_mode", "third"], "--grad-mode 'third' is unknown"),
        (["train", "--exp_path", "x", "--K", "-1"], "--K -1 must be at least 0"),
        (["train", "--exp_path", "x", "--data_path", "nonsense"], "is no folder, and no task"),
        (["train", "--exp_path", "x", "--n_layr", "2"], "Did you mean --n_layer"),
        (["train"], "required: --exp_path"),
        (["eval", "--model", "nowhere/at/all", "--data_path", "N2-K1V1-V4"], "cannot be loaded"),
        (["plot"], "leave nothing to do"),
        (["plot", "--results", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(command, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    done = invoke(*command)
    output = done.output + capfd.readouterr().err
    assert done.exit_code in (1, 2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_wrong_files_are_told(run):
    assert invoke("plot", "--results", run / "memory" / "config.json").exit_code == 1
    refused = invoke("eval", "--model", run / "vanilla", "--data_path", "N2-K1V1-V4", "--K", 1)
    assert "has no memory to write" in " ".join(refused.output.split())
    refused = invoke("plot", "--cost_of", run / "vanilla")
    assert "without a memory" in " ".join(refused.output.split())
    refused = invoke("plot", "--results", run / "memory", "--metric", "bleu")
    assert "metric='bleu' is none of" in " ".join(refused.output.split()).replace("--metric ", "metric=")


@pytest.mark.timeout(200)
def test_the_seed_s_script_runs_under_accelerate(tmp_path):
    launch = ["accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate.yaml"]
    script = EXAMPLES / "run_gradmemgpt_on_kv_retrieval.py"
    command = [sys.executable, "-m", *launch, script, *words(tmp_path / "run", max_steps=2)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2


def test_the_baseline_s_script_takes_the_same_arguments(tmp_path, monkeypatch):
    script = EXAMPLES / "run_gpt2_on_kv_retrieval.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words(tmp_path / "run", max_steps=2)])
    runpy.run_path(str(script), run_name="__main__")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["vanilla"]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_that_accumulates(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port()}"]
    script = EXAMPLES / "run_gradmemgpt_on_kv_retrieval.py"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    run = {"max_steps": 4, "K": 2, "eval_rows": 7}
    done = subprocess.run(
        [*map(str, (*command, script, *words(tmp_path / "two", **run)))],
        env=environment,
        timeout=250,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train(options(tmp_path / "one", **run, gradient_accumulation_steps=2))
    for name in ("loss", "eval_loss", "eval_inner_loss_2", "eval_token_accuracy"):
        two, one = (column(tmp_path / folder, name) for folder in ("two", "one"))
        assert two == pytest.approx(one, rel=1e-3), name


def port():
    return 29_500 + os.getpid() % 1000
