import csv
import html
import json
import re

import pytest

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.analysis import weight_statistics
from hf_gradtools.nanogpt.analysis.cli import inspect_main, softmax_main, stats_main
from hf_gradtools.nanogpt.data import TokenFolder, char_tokenizer


@pytest.fixture
def model(tmp_path):
    config = NanoGPTConfig(vocab_size=27, block_size=8, n_layer=1, n_head=2, n_embd=8)
    model = NanoGPTForCausalLM(config)
    model.save_pretrained(tmp_path / "[model]")
    char_tokenizer("abcdefghijklmnopqrstuvwxyz ").save_pretrained(tmp_path / "[model]")
    return model


def test_checkpoints_are_printed_and_written(tmp_path, capsys):
    for name, best in {"[bold]slow": 2.5, "quick": 1.5}.items():
        (tmp_path / name).mkdir()
        figures = {"best_val_loss": best, "best_val_iter": 4, "num_params": 1234, "vocab_size": 65}
        (tmp_path / name / "training.json").write_text(json.dumps(figures))
    inspect_main(["--directory", str(tmp_path), "--output", str(tmp_path / "table.csv")])
    printed = capsys.readouterr().out
    assert printed.index("quick") < printed.index("[bold]slow")
    assert "1,234" in printed
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["best_val"]) for row in rows] == [("quick", "1.5"), ("[bold]slow", "2.5")]
    inspect_main(["--directory", str(tmp_path), "--output", str(tmp_path / "table.json"), "--reverse"])
    assert [row["best_val"] for row in json.loads((tmp_path / "table.json").read_text())] == [2.5, 1.5]


def test_no_checkpoints_are_told(tmp_path, capsys):
    inspect_main(["--directory", str(tmp_path)])
    assert "no checkpoints below" in capsys.readouterr().out


def test_statistics_are_printed_drawn_and_written(model, tmp_path, capsys):
    outputs = {name: str(tmp_path / name) for name in ("stats.json", "stats.html", "stats.png")}
    stats_main([
        "--out_dir", str(tmp_path / "[model]"), "--text", "what is a text to run on", "--device", "cpu",
        "--output", outputs["stats.json"], "--html", outputs["stats.html"], "--figure", outputs["stats.png"],
    ])  # fmt: skip
    rows = json.loads((tmp_path / "stats.json").read_text())
    expected = weight_statistics(model).to_list()
    weights = [{name: row[name] for name in ("name", "stdev", "abs_max")} for row in rows if row["of"] == "weights"]
    assert weights == [{name: row[name] for name in ("name", "stdev", "abs_max")} for row in expected]
    assert [row["count"] for row in rows if row["name"] == "lm_head" and row["of"] == "activations"] == [24 * 27]
    page = html.unescape((tmp_path / "stats.html").read_text())
    assert all(re.search(rf"<td>{row['name']}</td>", page) for row in rows)
    assert "Statistics of" in page
    assert {"stats.png", "stats_activations.png"} <= {path.name for path in tmp_path.iterdir()}
    assert f"{expected[0]['stdev']:.5g}" in capsys.readouterr().out


def test_statistics_of_a_dataset_run_on_its_validation_tokens(tmp_path, capsys):
    vocab_size = TokenFolder("shakespeare_char").vocab_size
    config = NanoGPTConfig(vocab_size=vocab_size, block_size=8, n_layer=1, n_head=2, n_embd=8)
    NanoGPTForCausalLM(config).save_pretrained(tmp_path / "model")
    argv = ["--out_dir", str(tmp_path / "model"), "--dataset", "shakespeare_char", "--max_tokens", "20"]
    stats_main([*argv, "--modules", "lm_head", "--device", "cpu"])
    assert re.search(rf"lm_head .* {20 * vocab_size:,} ", capsys.readouterr().out)


def test_softmax_variants_are_compared(tmp_path, capsys):
    output, figure = tmp_path / "weights.csv", tmp_path / "softmax.svg"
    softmax_main([
        "--scores", "0", "1.5", "-2", "--variants", "softmax", "consmax", "--config", '{"consmax_initial_gamma": 1}',
        "--output", str(output), "--figure", str(figure),
    ])  # fmt: skip
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [0, 1.5, -2]
    assert sum(float(row["softmax"]) for row in rows) == pytest.approx(1)
    assert float(rows[0]["consmax"]) == pytest.approx(0.0820850, rel=1e-4)  # e^-2.5
    assert "consmax" in capsys.readouterr().out
    assert "<svg" in figure.read_text()


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (inspect_main, ["--directory", "/nowhere"], "Error: --directory '/nowhere' is no folder"),
        (inspect_main, ["--output", "table.txt"], "must end in .csv or .json"),
        (stats_main, ["--text", "a", "--dataset", "b"], "exclude each other"),
        (stats_main, ["--out_dir", "/nowhere"], "cannot be loaded"),
        (softmax_main, ["--config", '{"gama": 1}'], "NanoGPTConfig has no gama"),
        (softmax_main, ["--config", '{"consmax_initial_gamma": -1}'], "must be positive"),
        (softmax_main, ["--figure", "softmax.exe"], "must end in .png"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, main, argv, message):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
