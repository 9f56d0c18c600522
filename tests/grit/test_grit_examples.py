"""The GRIT examples run offline, on a tiny model and local rows, with and without 4-bit weights."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples" / "grit"
ROWS = {
    "alpaca": lambda i: {"instruction": f"a {i}", "input": "b" * (i % 2), "output": str(i % 10)},
    "dolly": lambda i: {"instruction": f"a {i}", "context": "b" * (i % 2), "response": "c", "category": "d"},
    "boolq": lambda i: {"question": f"a {i % 10}", "passage": "b c d", "answer": i % 2 == 0},
    "qnli": lambda i: {"question": f"a {i % 10}", "sentence": "b c d", "label": i % 2, "idx": i},
    "gsm8k": lambda i: {"question": f"a {i % 10}", "answer": f"b {i % 10}"},
}
QUANTISED = pytest.param(["--qlora"], marks=pytest.mark.bnb, id="qlora")


@pytest.fixture(autouse=True)
def example(monkeypatch, datasets_cache):
    """As `python examples/grit/...` finds the module beside it, and is found by none after it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "common", raising=False)


def arguments(name, model, tmp_path, *more):
    rows = tmp_path / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(ROWS[name](i)) + "\n" for i in range(16)))
    paths = ["--model", model, "--dataset", rows, "--output_dir", tmp_path / "out"]
    return [str(x) for x in (*paths, "--max_steps", 2, "--batch_size", 4, "--val", 4, *more)]


@pytest.mark.parametrize("more", [pytest.param([], id="plain"), QUANTISED])
@pytest.mark.parametrize("name", ROWS)
def test_example_trains(name, more, tiny_model, tmp_path, monkeypatch, capsys):
    if more:
        pytest.importorskip("bitsandbytes")
    script = str(EXAMPLES / f"train_{name}.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments(name, tiny_model, tmp_path, *more, "--preset", "short")])
    runpy.run_path(script, run_name="__main__")
    output = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"{metrics['eval_loss_after']:.4f} after 2 steps" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert ("4-bit" in output) == bool(more)
    if name in ("boolq", "qnli"):
        accuracy = re.search(r"accuracy    ([\d.]+) on held-out rows", output)
        assert float(accuracy[1]) in (0, 0.25, 0.5, 0.75, 1)


def test_example_runs_from_the_root_as_a_script(tiny_model, tmp_path):
    flags = arguments("gsm8k", tiny_model, tmp_path, "--max_length", 32, "--learning_rate", 1e-3, "--seed", 3)
    command = [sys.executable, "examples/grit/train_gsm8k.py", *flags, "--report_to", "none"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=EXAMPLES.parents[1], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 3


def test_dataset_with_other_columns_is_named(tiny_model, tmp_path, monkeypatch):
    flags = arguments("boolq", tiny_model, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_qnli.py", *flags])
    with pytest.raises(ValueError, match="boolq.jsonl' has no column 'sentence'. It has question, passage, answer"):
        runpy.run_path(str(EXAMPLES / "train_qnli.py"), run_name="__main__")


def test_accuracy_counts_the_likelier_answer(tiny_model, tmp_path, monkeypatch):
    """Of a model that has learnt that every answer is yes, what it gets right is the share of yes."""
    common = runpy.run_path(str(EXAMPLES / "common.py"))
    boolq = runpy.run_path(str(EXAMPLES / "train_boolq.py"))
    flags = arguments("boolq", tiny_model, tmp_path)
    (tmp_path / "boolq.jsonl").write_text(
        "".join(json.dumps({**ROWS["boolq"](i), "answer": True}) + "\n" for i in range(32))
    )
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({**ROWS["boolq"](i), "answer": i % 4 > 0}) + "\n" for i in range(8)))
    flags += ["--max_steps", "8", "--learning_rate", "0.02", "--val", str(held_out)]
    parsed = boolq["HfArgumentParser"](boolq["Arguments"]).parse_args_into_dataclasses(flags)[0]
    run = common["fine_tune"](parsed, boolq["format_row"])
    assert common["accuracy"](run, ["yes", "no"]) == 0.75
    assert common["accuracy"](run, ["no", "yes"]) == 0.75
