"""`hf-gradtools nanogpt sweep` and `search` on trainings of a few iterations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_gradtools.nanogpt import NanoGPTConfig, TokenFolder, hardware_report
from hf_gradtools.nanogpt.search.cli import hyperparam_search_main, run_experiments_main
from hf_gradtools.nanogpt.search.exploration import read_exploration
from hf_gradtools.nanogpt.search.reading import read_documents
from hf_gradtools.nanogpt.search.results import results_table
from hf_gradtools.nanogpt.search.training_run import check_flags, layer_lists, report_of_flags, train_run
from hf_gradtools.nanogpt.training import run, run_flags


TINY = {
    "dataset": "shakespeare_char", "device": "cpu", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16,
    "batch_size": 2, "max_iters": 3, "eval_interval": 3, "eval_iters": 1, "warmup_iters": 0,
    "never_save_checkpoint": True,
}  # fmt: skip
EXPLORATIONS = Path(__file__).parents[3] / "examples" / "nanogpt" / "explorations"


def written(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def tiny_sweep(tmp_path, *flags, **axes):
    common = {name: value for name, value in TINY.items() if name not in axes}
    config = written(tmp_path / "tiny.yaml", {"common_group": common, **axes})
    run_experiments_main(["-c", config, "-o", str(tmp_path / "out"), "--no-progress", *flags])
    return tmp_path / "out" / "tiny"


def test_a_sweep_of_trainings_with_a_list_valued_argument_and_a_run_that_is_refused(tmp_path, capsys):
    variants = [["causal", "ssm"], "causal"]
    folder = tiny_sweep(tmp_path, "--no_spawn_subprocess", attention_variant=variants, n_layer=2, n_head=[2, "3"])
    documents = list(yaml.safe_load_all((folder / "results.yaml").read_text()))
    assert [document["status"] for document in documents] == ["complete", "failed"] * 2
    assert "n_embd=16" in documents[1]["error"]["message"]
    hybrid = report_of_flags({**TINY, "n_layer": 2, "attention_variant": ["causal", "ssm"]})
    assert documents[0]["num_params"] == hybrid.params
    assert documents[0]["btc_per_param"] == documents[0]["better_than_chance"] / documents[0]["num_params"]
    assert documents[0]["best_val_iter"] in (0, 3)
    assert sorted(results_table(folder)["status"]) == ["complete"] * 2 + ["failed"] * 2
    printed = capsys.readouterr().out
    assert "4 runs in" in printed
    assert "2 complete, 2 failed" in printed


@pytest.mark.slow
def test_trainings_in_processes_of_their_own_on_two_workers(tmp_path):
    folder = tiny_sweep(tmp_path, "--workers", "2", n_layer=[1, 2])
    table = results_table(folder)
    assert table["status"][:] == ["complete"] * 2
    assert all((Path(run) / "run.log").exists() for run in table["out_dir"])


def test_a_search_over_trainings_by_a_cost_of_the_hardware(tmp_path, capsys):
    settings = written(tmp_path / "base.yaml", TINY | {"mlp_size": [32]})
    results = tmp_path / "log.yaml"
    words = ["--param_names", "mlp_size", "n_layer", "--increments", "16", "1", "--efficiency_target", "macs"]
    words += ["--override_cfg", "learning_rate=1e-2", "n_embd=8", "--no_spawn_subprocess", "--progress", "false"]
    hyperparam_search_main(["--orig_settings", settings, "--results_file", str(results), *words])
    (log,) = read_documents(results)
    assert (log["settings"]["baseline"]["learning_rate"], log["settings"]["baseline"]["n_embd"]) == (0.01, 8)
    wider, deeper = log["iterations"][1]["candidates"]
    assert (wider["param"], wider["value"], deeper["param"]) == ("mlp_size[0]", 48, "n_layer")
    base = {**log["settings"]["baseline"]}
    expected = report_of_flags({**base, "mlp_size": [48]}).macs_per_token - report_of_flags(base).macs_per_token
    assert wider["delta_cost"] == expected > 0
    assert (tmp_path / "log" / "path.png").exists()
    assert "score" in capsys.readouterr().out


def test_a_killed_training_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(tmp_path, monkeypatch):
    flags = {**TINY, "eval_interval": 2, "lr_decay_iters": 6, "never_save_checkpoint": False}
    folders = {name: tmp_path / name for name in ("killed", "killed-retry1", "whole")}
    train_run({**flags, "max_iters": 4}, folders["killed"])
    folders["killed-retry1"].mkdir()
    (folders["killed-retry1"] / "earlier.json").write_text('["killed"]')
    began = []
    monkeypatch.setattr(
        run, "run_flags", lambda flags, **more: began.append(flags.get("init_from")) or run_flags(flags, **more)
    )
    resumed, whole = (train_run({**flags, "max_iters": 6}, folders[name]) for name in ("killed-retry1", "whole"))
    assert began == ["resume", None]
    timed = {"iter_latency_avg", "peak_gpu_mb"}
    assert {k: v for k, v in resumed.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
    assert resumed["iters"] == 6
    assert (folders["killed-retry1"] / "run.log").read_text().count("val loss") == 1  # of iteration 6 alone


def test_a_training_whose_journal_was_deleted_is_run_anew(tmp_path):
    first, second = (train_run({**TINY, "never_save_checkpoint": False}, tmp_path / "run") for _ in range(2))
    assert first["best_val_loss"] == second["best_val_loss"]


def test_the_hardware_report_of_flags_is_that_of_the_model():
    config = NanoGPTConfig(
        vocab_size=TokenFolder("shakespeare_char").vocab_size, n_layer=1, n_head=2, n_embd=16, block_size=16
    )
    assert report_of_flags(TINY) == hardware_report(config)
    assert report_of_flags({**TINY, "n_embd": "16", "n_kv_group": None}) == hardware_report(config)
    with pytest.raises(ValueError, match="init_from='gpt2'"):
        report_of_flags({**TINY, "init_from": "gpt2"})


def test_lists_of_layers_are_told_from_other_flags():
    assert {"attention_variant", "mlp_size", "window_size", "n_kv_group"} <= set(layer_lists())
    assert not {"n_layer", "softmax_variant_output", "learning_rate"} & set(layer_lists())


@pytest.mark.parametrize("name", sorted(path.name for path in EXPLORATIONS.iterdir()))
def test_the_explorations_of_the_examples_describe_models(name):
    runs = read_exploration(EXPLORATIONS / name)
    check_flags(each.config for each in runs)
    for each in runs:
        report_of_flags(each.config)
    assert len(runs) == (1 if name == "baseline.yaml" else 6)


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (run_experiments_main, ["-c", "none.yaml"], "none.yaml"),
        (run_experiments_main, ["-c", "{unknown}"], "unknown options: n_hed. Did you mean n_head"),
        (run_experiments_main, ["-c", "{wrong}"], "'many' is no whole number"),
        (run_experiments_main, ["-c", "{out}"], "out_dir is in the configuration"),
        (run_experiments_main, ["-c", "{empty}"], "n_head is an empty list"),
        (run_experiments_main, ["-c", "{fine}", "--workers", "0"], "--workers 0 must be at least 1"),
        (run_experiments_main, ["-c", "{fine}", "--config_format", "toml"], "--config-format 'toml' is unknown"),
        (hyperparam_search_main, ["--orig_settings", "{fine}", "--param_names", "lr", "--increments", "1"], "'lr'"),
        (
            hyperparam_search_main,
            ["--orig_settings", "{fine}", "--param_names", "a", "b", "c", "--increments", "1", "2"],
            "are 2 for 3 param_names",
        ),
        (
            hyperparam_search_main,
            ["--orig_settings", "{fine}", "--param_names", "n_head", "--increments", "1", "--override_cfg", "x"],
            "--override-cfg 'x' is not KEY=VALUE",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, main, words, told):
    monkeypatch.chdir(tmp_path)
    files = {"unknown": {"n_hed": 1}, "out": {"out_dir": "x"}, "empty": {"n_head": []}, "fine": {"n_head": 2}}
    files["wrong"] = {"n_layer": [1, 2], "max_iters": [2e3, "many"]}
    paths = {name: written(tmp_path / f"{name}.yaml", value) for name, value in files.items()}
    with pytest.raises(SystemExit) as ended:
        main([word.format(**paths) for word in words])
    assert ended.value.code == 1
    printed = capsys.readouterr().err.strip()
    assert told in printed
    assert "\n" not in printed
    assert not list(tmp_path.rglob("metrics.json"))


def test_a_dry_run_lists_and_a_sweep_without_a_complete_run_fails(tmp_path, capsys):
    folder = tiny_sweep(tmp_path, "--dry_run", n_layer=[1, 2])
    assert "tiny-2" in capsys.readouterr().out
    assert not folder.exists()
    with pytest.raises(SystemExit) as ended:
        tiny_sweep(tmp_path, "--no_spawn_subprocess", n_layer=0)
    assert ended.value.code == 1


def test_supervising_imports_neither_torch_nor_optuna_until_it_starts():
    rooms = ", ".join(f"hf_gradtools.nanogpt.search.{room}" for room in ("cli", "sweep", "greedy", "plots"))
    heavy = "{'torch', 'optuna', 'matplotlib', 'datasets'} & set(sys.modules)"
    code = f"import sys, {rooms}; sys.exit(' '.join({heavy}) or None)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_processes_are_not_forked_from_one_that_may_have_started_cuda():
    code = "import sys, torch; torch.cuda.device_count = lambda: 1; import hf_gradtools.nanogpt.search.preload;"
    code += "sys.exit(' '.join({'transformers.trainer', 'bitsandbytes'} & set(sys.modules)) or None)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
