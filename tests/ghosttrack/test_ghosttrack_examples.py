"""The example runs offline, on a tiny model and data."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from hf_gradtools.sae.saving import save_many
from tests.ghosttrack.tiny_detection import make_saes


SCRIPT = Path(__file__).parents[2] / "examples" / "ghosttrack" / "detect.py"


def test_a_detector_is_fitted_saved_and_asked(tiny_model, tmp_path):
    draw = random.Random(0)
    questions = [f"{draw.choice('abcdefghij')} {number % 10} {draw.choice('abcdefghij')}?" for number in range(20)]
    rows = [
        {"question": question, "answer": answer, "label": label}
        for question in questions
        for label, answer in enumerate(("a c", "b c"))
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_many(make_saes(), tmp_path / "saes")
    fit = ["--fit", tmp_path / "answers.jsonl", "--model", tiny_model, "--saes", tmp_path / "saes"]
    asked = ["--question", "a 3 b?", "--answer", "a c", "--question", "a 3 b?", "--answer", "b c"]
    where = ["--detector", tmp_path / "detector", "--plots", tmp_path / "plots"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, [*fit, *where, *asked])], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    area, true, false = done.stdout.splitlines()
    assert area.startswith("AUROC 1.000 [")
    assert float(true.split()[0]) < 0.5 < float(false.split()[0])
    assert "SUPPORTED: a 3 b? a c" in true
    assert "HALLUCINATED: a 3 b? b c" in false
    assert (tmp_path / "plots" / "tracks-1.svg").read_text().startswith("<svg")


def test_the_example_is_short():
    code = [line for line in SCRIPT.read_text().splitlines() if line and not line.startswith(("#", '"'))]
    assert len([line for line in code if not line.startswith(("parser", "from", "import", "options"))]) <= 40
