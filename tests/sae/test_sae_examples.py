"""The examples run offline, on a tiny model and data."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from hf_gradtools.sae import load_many


EXAMPLES = Path(__file__).parents[2] / "examples" / "sae"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as its command line would, but for the seconds that a process of its own would import."""

    def run_script(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.mark.usefixtures("datasets_cache")
def test_train_and_steer(tiny_model, tmp_path, run):
    choose = random.Random(0)
    lines = [json.dumps({"text": " ".join(choose.choices("abcdefghij", k=40))}) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    sizes = ["--d_sae", 64, "--k", 4, "--context_length", 32, "--batch_tokens", 128]
    where = ["--dataset", tmp_path / "texts.jsonl", "--output_dir", tmp_path / "saes"]
    told = run("train_sae.py", "--model", tiny_model, *where, *sizes, "--hookpoints", "layers.0", "layers.1")
    assert "layers.1: FVU 0." in told
    assert list(load_many(tmp_path / "saes")) == ["layers.0", "layers.1"]
    steering = ["--saes", tmp_path / "saes", "--hookpoint", "layers.1", "--text", "a b c", "--strength", 50]
    shown = run("steer.py", "--model", tiny_model, *steering, "--max_new_tokens", 5).splitlines()
    assert [line.split(":")[0] for line in shown[:3]] == ["'a'", "'b'", "'c'"]
    plain, steered = (line.split(":", 1)[1].strip() for line in shown[3:])
    assert plain.startswith("a b c")
    assert steered.startswith("a b c")
    assert steered != plain


@pytest.mark.parametrize("script", ["train_sae.py", "steer.py"])
def test_examples_are_short(script):
    code = [line for line in (EXAMPLES / script).read_text().splitlines() if line and not line.startswith(("#", '"'))]
    assert len([line for line in code if not line.startswith(("parser", "from", "import", "options"))]) <= 30
