"""Runs told by flags: from a mapping, a YAML file, a command line."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from hf_gradtools.nanogpt.training import run_flags
from hf_gradtools.nanogpt.training.cli import main
from hf_gradtools.nanogpt.training.run import split_flags, train_parser
from hf_gradtools.nanogpt.training.starting import config_fields
from hf_gradtools.workflow.flags import given_flags
from tests.nanogpt.training.reference import MODEL, RUN, history


SHORT = {**RUN, **MODEL, "max_iters": 2, "eval_interval": 2}


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_flags_reach_options_and_model_whole(dataset, tmp_path):
    flags = {
        **SHORT, "n_layer": 3, "dataset": dataset, "out_dir": str(tmp_path / "out"), "mlp_variant": ["mlp", "swiglu"],
        "window_size": [4, None], "learning_rate": "2e-3", "wte_weight_tying": False, "patience": None,
    }  # fmt: skip
    result = run_flags(flags)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.mlp_variant == ["mlp", "swiglu"]
    assert config.window_size == [4, None]
    assert config.tie_word_embeddings is False
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["learning_rate"] == 2e-3
    assert result.iters == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"n_head": 2, "batchsize": 3}, "unknown options: batchsize. Did you mean batch_size"),
        ({"max_iters": "many"}, "max_iters.*'many' is no whole number"),
        ({"max_iters": 2.5}, "max_iters.*'2.5' is no whole number"),
        ({"layer_types": ["full_attention"]}, "unknown options: layer_types"),
        ({"n_layer": 2, "num_hidden_layers": 3}, "n_layer is given twice, as num_hidden_layers=3 too"),
        ({"attention_variant": ["causal", "--n_layer=3"]}, "attention_variant=.* none that is a flag"),
        ({"mlp_size": []}, "mlp_size=.. must have elements"),
    ],
)
def test_wrong_flags_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        run_flags(flags)


def test_every_field_of_the_model_has_a_flag():
    parser = train_parser()
    defaults = vars(parser.parse_args([]))
    for name, field in config_fields().items():
        assert defaults[name] == field.default
    assert {"attention_variant", "use_flash_lobo", "kan_poly_order", "ssm_d_state"} <= set(config_fields())
    flags = given_flags(parser, ["--no-use_rotary_embeddings", "--bias", "--no-wte_weight_tying", "--n_layer", "2"])
    assert flags == {"use_rotary_embeddings": False, "bias": True, "tie_word_embeddings": False, "n_layer": 2}
    for heading in ("Training", "Model: sizes", "Model: attention", "Model: norms"):
        assert f"\n{heading}:" in parser.format_help()
    assert "heads of keys and values" in " ".join(parser.format_help().split())


def test_values_survive_being_written_as_words():
    flags = {"sample_start_tokens": "-\n x", "consmax_initial_beta": -2.5, "kan_middle_layers": [3], "bias": True}
    options, model = split_flags(flags)
    assert {**options, **model} == flags


def test_whole_numbers_may_be_written_as_a_range_or_yaml_has_them():
    options, model = split_flags({"max_iters": 2e3, "n_layer": 2.0, "mlp_size": [8.0], "learning_rate": "-0.0"})
    assert {**options, **model} == {"max_iters": 2000, "n_layer": 2, "mlp_size": 8, "learning_rate": 0.0}
    assert all(type(value) is int for value in (options["max_iters"], model["n_layer"]))


def test_command_line_with_a_file_and_resuming_without_repeating_it(dataset, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in {**SHORT, "dataset": dataset}.items()))
    out_dir = str(tmp_path / "out")
    main(["--config", str(file), "--out_dir", out_dir, "--max_iters", "4", "--no-progress"])
    assert "best val loss" in capsys.readouterr().out
    main(["--out_dir", out_dir, "--init_from", "resume", "--max_iters", "6", "--lr_decay_iters", "4"])
    assert [step for step, _ in history(out_dir, "eval_loss")] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_head", "3", "--n_embd", "16"], "Error: "),
        (["--config", "missing.yaml"], "Error: --config missing.yaml cannot be read"),
        (["--dataset", "nowhere"], "Error: --dataset 'nowhere' is no folder"),
        (["--patience", "-1"], "Error: --patience -1 must be at least 0"),
    ],
)
def test_errors_of_the_command_line_take_one_line(argv, message, dataset, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--dataset", dataset, "--out_dir", str(tmp_path / "out"), *argv])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
