"""The command group, and the hardware report on it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.nanogpt import NanoGPTConfig, hardware_report
from hf_gradtools.nanogpt.cli import COMMANDS


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "nanogpt").glob("*.py"))
SMALL = ["--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--vocab_size", "65", "--block_size", "8"]


def run(*words):
    return CliRunner().invoke(app, ["nanogpt", *words], env={"COLUMNS": "400"})


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_of_its_own_flags(command):
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert f"usage: hf-gradtools nanogpt {command}" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n_embd", "15", "--n_head", "2"], "n_embd=15 must be a multiple of n_head=2"),
        (["--softmax_variant_attn", "softmin"], "softmax variant 'softmin' is unknown. Known: consmax,"),
        ([*SMALL, "--bytes_per_number", "0"], "bytes_per_number=0 must be at least 1"),
        ([*SMALL, "--activation_variant", "laplace"], "nobody counted its operations"),
        (["--compare", "no/such folder"], "there is no such file or folder"),
        ([*SMALL, "--compare", "a.yaml"], "leave out --vocab_size"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words, message):
    result = run("hardware", *words)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_report_of_flags_is_that_of_the_library(tmp_path):
    result = run("hardware", *SMALL, "--attention_variant", "causal", "ssm", "--json_file", str(tmp_path / "r.json"))
    config = NanoGPTConfig(
        n_layer=2, n_head=2, n_embd=16, vocab_size=65, block_size=8, attention_variant=["causal", "ssm"]
    )
    expected = hardware_report(config)
    assert json.loads((tmp_path / "r.json").read_text())["this"] == json.loads(json.dumps(expected.as_dict()))
    assert f"parameters  {expected.params:,}" in result.output
    assert f"{expected.decode['h.1.attn'].exp:,}" in result.output


def test_configurations_are_compared_from_folders_and_files(tmp_path):
    NanoGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=65, block_size=8).save_pretrained(tmp_path / "model")
    file = tmp_path / "flags.yaml"
    file.write_text("{n_layer: 2, n_head: 2, n_embd: 16, vocab_size: 65, block_size: 8, max_iters: 3}")
    result = run("hardware", "--compare", str(tmp_path / "model"), str(file))
    row = next(line for line in result.output.splitlines() if line.startswith("decode exp"))
    assert row.split()[2:] == ["16", "32", "(2.00x)"]  # a layer, or two, of 2 heads over 8 keys


def test_a_folder_without_our_configuration_is_none(tmp_path):
    assert "holds no config.json" in run("hardware", "--compare", str(tmp_path)).output
    LlamaConfig().save_pretrained(tmp_path)
    assert "a llama model, whose parts nobody counted" in run("hardware", "--compare", str(tmp_path)).output


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_each_example_is_the_command(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "usage: hf-gradtools nanogpt " in capsys.readouterr().out
