"""The generated Slurm job: executed with a stand-in for the command, which records its calls."""

import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from hf_gradtools.ghosttrack.phases.sbatch import PHASES, make_sbatch
from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig, parse_layers


EXAMPLES = Path(__file__).parents[2] / "examples" / "ghosttrack"
# Records phase, layers, device and arguments; fails where the file `fail` names this phase and these layers.
STUB = """#!/bin/bash
phase="$2"; config="$4"; layers="$6"; shift 6
[[ -e "done-$phase-$layers" ]] && exit 0
if [[ -e hang ]]; then echo "$$" >> hanging; exec sleep 60; fi
sleep 0.05
printf '%s|%s|%s|%s|%s\\n' "$phase" "$layers" "$CUDA_VISIBLE_DEVICES" "$config" "$*" >> calls
if [[ -e fail && "$(cat fail)" == "$phase $layers" ]]; then echo "no memory left"; exit 3; fi
touch "done-$phase-$layers"
"""


@pytest.fixture
def job(tmp_path):
    """Runs a script in a folder with spaces in its name; gives the process and the calls of the command."""
    folder = tmp_path / "a folder"
    (folder / "bin").mkdir(parents=True)
    stub = folder / "bin" / "hf-gradtools"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(script, **variables):
        (folder / "job.sbatch").write_text(script)
        kept = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment = {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder)}
        process = subprocess.run(
            ["bash", str(folder / "job.sbatch")],
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = folder / "calls"
        return process, [line.split("|") for line in calls.read_text().splitlines()] if calls.exists() else []

    run.folder = folder
    return run


def script_for(name="gpt2-small", gpus=4, overrides=(), **options):
    config = GhostTrackConfig.from_yaml(name, overrides)
    return make_sbatch(config, gpus, config_path=name, **options)


@pytest.mark.parametrize(
    ("file", "name"), [("full_pipeline", "gpt2-small"), ("gpt2_medium_full_pipeline", "gpt2-medium")]
)
def test_examples_are_what_is_generated(file, name):
    assert (EXAMPLES / f"{file}.sbatch").read_text() == script_for(name, job_name=file)


def test_the_two_examples_give_each_gpu_its_layers():
    assert "LAYERS=(0-2 3-5 6-8 9-11)" in (EXAMPLES / "full_pipeline.sbatch").read_text()
    assert "LAYERS=(0-5 6-11 12-17 18-23)" in (EXAMPLES / "gpt2_medium_full_pipeline.sbatch").read_text()


@pytest.mark.parametrize(
    ("name", "gpus", "selection"),
    [
        ("gpt2-small", 4, "all"),
        ("smollm2-135m", 4, "all"),
        ("gpt2-small", 1, "all"),
        ("gpt2-medium", 3, "0-3,9,11,20"),
    ],
)
def test_each_phase_sees_each_layer_once(job, name, gpus, selection):
    overrides = [f"extraction.layers={selection}"]
    process, calls = job(script_for(name, gpus, overrides))
    assert process.returncode == 0, process.stderr
    layers = GhostTrackConfig.from_yaml(name, overrides).layers
    for phase in PHASES:
        seen = [layer for call in calls if call[0] == phase for layer in parse_layers(call[1], 99)]
        assert sorted(seen) == layers
    sizes = [len(parse_layers(call[1], 99)) for call in calls if call[0] == "train"]
    assert len(sizes) == gpus
    assert max(sizes) - min(sizes) <= 1
    assert [phase for i, (phase, *_) in enumerate(calls) if i == 0 or calls[i - 1][0] != phase] == list(PHASES)


def test_each_process_has_a_gpu_of_its_own(job):
    _, calls = job(script_for(gpus=2), CUDA_VISIBLE_DEVICES="5,7")
    assert {(layers, device) for phase, layers, device, *_ in calls if phase == "train"} == {
        ("0-5", "5"),
        ("6-11", "7"),
    }


def test_too_few_gpus_are_said(job):
    process, calls = job(script_for(gpus=4), CUDA_VISIBLE_DEVICES="0,1")
    assert process.returncode == 2
    assert "names 2 GPUs; this script needs 4" in process.stderr
    assert not calls


def test_batch_sizes_come_from_the_configuration_or_the_environment(job):
    _, calls = job(script_for("gpt2-medium", 1))
    assert calls[0][4] == "--set extraction.batch_size=16 --set sae_training.batch_size=128"
    (job.folder / "calls").unlink()
    for file in job.folder.glob("done-*"):
        file.unlink()
    _, calls = job(script_for("gpt2-medium", 1), EXTRACT_BATCH_SIZE="7", TRAIN_BATCH_SIZE="9")
    assert calls[0][4] == "--set extraction.batch_size=7 --set sae_training.batch_size=9"


def test_a_failing_layer_fails_the_job_which_then_resumes(job):
    (job.folder / "fail").write_text("train 3-5")
    process, calls = job(script_for())
    assert process.returncode == 1
    assert "train failed with status 3 on layers 3-5" in process.stderr
    assert "no memory left" in process.stderr
    assert sorted(call[:2] for call in calls if call[0] == "train") == [
        ["train", group] for group in ("0-2", "3-5", "6-8", "9-11")
    ]
    assert not any(call[0] == "track" for call in calls)
    (job.folder / "fail").unlink()
    process, again = job(script_for())
    assert process.returncode == 0, process.stderr
    assert [call[:2] for call in again[len(calls) :]] == [
        ["train", "3-5"],
        *([phase, "0-11"] for phase in ("track", "detect", "evaluate")),
    ]


def test_a_cancelled_job_leaves_no_process(job):
    (job.folder / "hang").touch()
    (job.folder / "job.sbatch").write_text(script_for(gpus=2))
    environment = {"PATH": f"{job.folder / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(job.folder)}
    process = subprocess.Popen(["bash", str(job.folder / "job.sbatch")], env=environment)
    hanging, deadline = job.folder / "hanging", time.monotonic() + 20
    while not hanging.exists() or len(hanging.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(20) == 143
    for pid in map(int, hanging.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_paths_and_overrides_are_quoted(job):
    name = "my $(touch broken) 'config'.yaml"
    config = GhostTrackConfig.from_yaml("gpt2-small", ["paths.results_dir=results of/$(touch broken)"])
    process, calls = job(make_sbatch(config, 2, config_path=name, overrides=["detection.dataset=a b;touch broken"]))
    assert process.returncode == 0, process.stderr
    assert {call[3] for call in calls} == {name}
    assert calls[0][4].endswith("--set detection.dataset=a b;touch broken")
    assert (job.folder / "results of" / "$(touch broken)" / "logs" / "train-layers-0-5.log").exists()
    assert not (job.folder / "broken").exists()


def test_setup_lines_run_first(job):
    process, _ = job(script_for(gpus=1, setup=["export READY=yes", 'echo "ready: $READY"']))
    assert process.stdout.startswith("ready: yes\n")


def test_the_script_is_strict_bash_with_directives():
    script = script_for(gpus=3, partition="gpu-long", account="lab")
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    lines = script.splitlines()
    assert {"#SBATCH --gres=gpu:3", "#SBATCH --partition=gpu-long", "#SBATCH --account=lab"} <= set(lines)
    assert lines.index("set -euo pipefail") < lines.index('cd "${SLURM_SUBMIT_DIR:-.}"')
    assert lines[2] == "#   " + shlex.join(
        ["hf-gradtools", "ghosttrack", "sbatch", "--config", "gpt2-small", "--gpus", "3"]
    )


@pytest.mark.parametrize("gpus", [0, 13])
def test_gpus_without_layers_are_refused(gpus):
    with pytest.raises(ValueError, match=f"gpus={gpus} cannot share 12 layers"):
        script_for(gpus=gpus)


@pytest.mark.parametrize("options", [{"partition": "a\nrm -rf x"}, {"job_name": "two words"}, {"cpus_per_gpu": 0}])
def test_settings_that_break_a_directive_are_refused(options):
    with pytest.raises(ValueError, match="SBATCH line|not positive"):
        script_for(**options)
