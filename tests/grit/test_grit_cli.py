"""`hf-gradtools grit` on a tiny model."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_gradtools import GritConfig
from hf_gradtools.cli import app


pytestmark = pytest.mark.usefixtures("datasets_cache")


def run(*args):
    return CliRunner().invoke(app, ["grit", *map(str, args)])


def refusal(result):
    """The one line that a refused command says."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if "Error" in line]
    assert len(lines) == 1, result.output
    return lines[0]


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains 4 steps on 12 of 16 rows; ranks are cut after the second."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"a {i % 10}", "answer": str(i % 10)}) + "\n" for i in range(16)))

    def train(*args):
        shared = ["--model", tiny_model, "--dataset", rows, "--output-dir", tmp_path / "out", "--val", 4, "--rank", 8]
        return run("train", *shared, "--batch-size", 3, "--max-steps", 4, *args)

    return train


@pytest.fixture
def often(monkeypatch):
    values = {"reprojection_freq": 2, "grit_cov_update_freq": 1, "kfac_min_samples": 1}
    monkeypatch.setitem(sys.modules["hf_gradtools.grit.config"].PRESETS, "often", values)
    return ["--preset", "often", "--rank-adaptation-threshold", 0.6]


@pytest.fixture
def adapter(train, often, tmp_path):
    assert train(*often).exit_code == 0
    return tmp_path / "out"


def test_train_says_what_it_does_and_what_came_of_it(train, often, tmp_path):
    result = train(*often)
    assert result.exit_code == 0, result.output
    assert "GRIT of rank 8" in result.stdout
    assert "12 rows of" in result.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"{metrics['eval_loss_before']:.4f} before, {metrics['eval_loss_after']:.4f} after" in result.stdout
    assert f"{metrics['parameters']:,} of {metrics['base_parameters']:,} parameters" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "medium"], "--preset 'medium' is unknown. Pass one of short, long, seed"),
        (["--text-column", "body"], "--text-column 'body' is no column of it. It has question, answer"),
        (["--resume"], "holds no run to continue. Start one without --resume"),
        (["--rank-adaptation-threshold", "2"], "--rank-adaptation-threshold 2.0 must be in (0, 1]"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(train, tmp_path, args, message):
    assert message in refusal(train(*args))
    assert not list((tmp_path / "out").glob("*"))


def test_folder_in_use_is_refused(train, adapter):
    assert "Continue it by --resume, or pass another folder" in refusal(train("--rank-adaptation-threshold", 0.6))


def test_missing_bitsandbytes_names_the_command(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusal(train("--qlora")).endswith("pip install 'hf_gradtools[bnb]'")


def test_inspect_shows_what_training_wrote(adapter):
    written = json.loads((adapter / "grit_ranks.json").read_text())
    result = run("inspect", adapter, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == written
    table = run("inspect", adapter).stdout
    name, row = next(iter(written["layers"].items()))
    line = next(line for line in table.splitlines() if line.startswith(name))
    assert line.split() == [name, str(row["rank"]), "8", f"{row['parameters']:,}"]
    assert f"({written['reduction']:.1%} fewer than at the start)" in table


def test_inspect_needs_neither_ranks_file_nor_matching_one(adapter):
    spectra = {"k_a", "k_b", "balanced"}
    ranks = adapter / "grit_ranks.json"
    written = json.loads(ranks.read_text())
    first, second, *_ = written["layers"]
    written["layers"][first]["rank"] += 1
    ranks.write_text(json.dumps(written))
    report = json.loads(run("inspect", adapter, "--json").stdout)
    assert not spectra & report["layers"][first].keys()
    assert spectra <= report["layers"][second].keys()
    ranks.unlink()
    alone = json.loads(run("inspect", adapter, "--json").stdout)
    assert (alone["parameters"], alone["base_parameters"]) == (report["parameters"], report["base_parameters"])
    assert alone["layers"][first] == report["layers"][first]


def test_inspect_reads_a_checkpoint_and_an_untrained_adapter(adapter, tiny_model, tmp_path):
    report = json.loads(run("inspect", adapter / "checkpoint-4", "--json").stdout)
    assert report["reduction"] > 0
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), GritConfig(r=4, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "new")
    report = json.loads(run("inspect", tmp_path / "new", "--json").stdout)
    assert {row["rank"] for row in report["layers"].values()} == {4}
    assert report["reduction"] == 0


def test_inspect_hands_the_report_to_the_plots(adapter, tmp_path, monkeypatch):
    drawn = []
    plots = types.ModuleType("hf_gradtools.grit.plots")
    plots.plot_ranks = plots.plot_spectra = lambda report, path: drawn.append((report["steps"], path))
    monkeypatch.setitem(sys.modules, "hf_gradtools.grit.plots", plots)
    figures = tmp_path / "figures"
    result = run("inspect", adapter, "--plots", figures)
    assert drawn == [(4, figures / "ranks.png"), (4, figures / "spectra.png")]
    assert f"figure  {figures / 'ranks.png'}" in result.stdout
    (adapter / "grit_ranks.json").unlink()
    assert "spectra.png" not in run("inspect", adapter / "checkpoint-4", "--plots", figures).stdout


def test_inspect_of_something_else_is_told_in_one_line(tiny_model, tmp_path):
    assert "cannot be read" in refusal(run("inspect", tmp_path))
    assert "Pass Hub id or folder of a saved GRIT adapter" in refusal(run("inspect", "nowhere/nothing"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert "LORA" in refusal(run("inspect", tmp_path / "lora"))


def test_export_writes_the_same_model_as_lora(adapter, tmp_path):
    result = run("export", adapter, tmp_path / "lora")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    ids = torch.arange(8)[None]
    ours, plain = (AutoPeftModelForCausalLM.from_pretrained(path)(ids).logits for path in (adapter, tmp_path / "lora"))
    torch.testing.assert_close(ours, plain)
    assert "exists already" in refusal(run("export", adapter, tmp_path / "lora"))


@pytest.mark.parametrize("ranks", ["[]", "{}", '{"layers": []}', '{"layers": {"a": 3}}', "not json"])
def test_inspect_without_usable_ranks_file(ranks, tmp_path):
    from tests.grit.reference import adapted

    adapted().save_pretrained(tmp_path)
    (tmp_path / "grit_ranks.json").write_text(ranks)
    done = CliRunner().invoke(app, ["grit", "inspect", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["layers"]) == 14


def test_inspect_of_damaged_weights(tmp_path):
    from tests.grit.reference import adapted

    adapted().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    done = CliRunner().invoke(app, ["grit", "inspect", str(tmp_path)])
    assert done.exit_code != 0
    assert "is damaged" in done.output
