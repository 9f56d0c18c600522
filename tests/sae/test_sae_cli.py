"""`hf-gradtools sae`: from texts to a store, autoencoders, figures and pages."""

from __future__ import annotations

import json
import random
import re

import pytest
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.sae import commands, load_many
from hf_gradtools.sae.options import BrowseOptions, EvalOptions, ExtractOptions, TrainOptions
from hf_gradtools.sae.store import ActivationStore


pytestmark = pytest.mark.usefixtures("datasets_cache")
QUICK = ["--use_cpu", "--batch_tokens", 64, "--num_features", 64, "--k", 4, "--calibration_tokens", 128]


def run(*words, code=0):
    """What a command printed, in one string."""
    done = CliRunner().invoke(app, ["sae", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    choose = random.Random(0)
    words = ["yes", "no", "Question", "Answer", *map(str, range(10)), *"abcdefghij"]
    lines = [json.dumps({"text": " ".join(choose.choices(words, k=40))}) for _ in range(60)]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def corpus(tiny_model, texts):
    return ["--model", tiny_model, "--dataset", texts, "--context_length", 32]


@pytest.fixture
def saes(corpus, tmp_path):
    run("train", *corpus, *QUICK, "--output_dir", tmp_path / "saes")
    return tmp_path / "saes"


def test_extract_train_eval_and_browse(corpus, tmp_path):
    store, saes = tmp_path / "store", tmp_path / "saes"
    assert "2,356 tokens of layers.0, layers.1" in run("extract", *corpus, "--output_dir", store, "--use_cpu")
    assert ActivationStore.open(store).complete
    told = run("train", "--store", store, "--output_dir", saes, *QUICK, "--epochs", 3)
    assert re.search(r"saes/layers\.1: FVU 0\.\d+, L0 [1-4]\.\d, dead [\d.]+%; trained on 6,528 tokens", told)
    table = run("eval", "--saes", saes, *corpus, "--out", tmp_path / "figures" / "eval.json", "--use_cpu")
    figures = json.loads((tmp_path / "figures" / "eval.json").read_text())
    assert list(figures) == ["layers.0", "layers.1"]
    row = next(line.split() for line in table.splitlines() if line.strip().startswith("layers.1"))
    assert float(row[1]) == pytest.approx(figures["layers.1"]["fvu"], abs=1e-4)
    recovered = figures["layers.1"]["cross_entropy"]["recovered"]  # None if zeros do this random model no harm
    assert row[5] == ("-" if recovered is None else f"{recovered:.4f}")
    run("browse", "--saes", saes, *corpus, "--output_dir", tmp_path / "pages", "--num_features", 3, "--use_cpu")
    assert sorted(page.name for page in (tmp_path / "pages").iterdir()) == ["layers.0.html", "layers.1.html"]
    assert "Answer" in (tmp_path / "pages" / "layers.0.html").read_text()


def test_a_second_run_resumes(corpus, tmp_path, monkeypatch):
    words = ["train", *corpus, *QUICK, "--output_dir", tmp_path / "saes", "--save_steps", 5]
    steps, stop_at = [], [2 * 12]
    original = commands.SAETrainer._step

    def interrupted(self, learner, batch):
        steps.append(learner.step)
        if len(steps) > stop_at[0]:
            raise KeyboardInterrupt
        return original(self, learner, batch)

    monkeypatch.setattr(commands.SAETrainer, "_step", interrupted)
    assert "with --resume continues it" in run(*words, code=130)
    assert "earlier training of layers.0. Pass --resume" in run(*words, code=1)
    message = run(*words, "--resume", "--learning_rate", 0.1, code=1)
    assert "--learning-rate 0.000707, not 0.1" in message
    del steps[:]
    stop_at[0] = 1000
    run(*words, "--resume")
    assert steps[0] == 10
    assert all(sae.config.metadata["evaluation"]["num_tokens"] == 118 for sae in load_many(tmp_path / "saes").values())
    number = len(steps)
    run(*words, "--resume")
    assert len(steps) == number


def test_a_store_and_the_model_itself_train_the_same(corpus, saes, tmp_path):
    run("extract", *corpus, "--output_dir", tmp_path / "store", "--use_cpu")
    run("train", "--store", tmp_path / "store", *QUICK, "--output_dir", tmp_path / "again" / "saes")
    for file in ("layers.0/sae_weights.safetensors", "layers.1/sae_weights.safetensors", "layers.1/cfg.json"):
        assert (saes / file).read_bytes() == (tmp_path / "again" / "saes" / file).read_bytes()


def test_chosen_hookpoints_and_flags_of_the_autoencoder(corpus, tmp_path):
    flags = ["--hookpoints", "layers.1.mlp", "--activation", "batchtopk", "--matryoshka", 16, 64, "--eval_share", 0]
    run("train", *corpus, *QUICK, *flags, "--output_dir", tmp_path)
    (sae,) = load_many(tmp_path).values()
    config = sae.config
    assert (config.hookpoint, config.activation, config.matryoshka_widths) == ("layers.1.mlp", "batchtopk", (16, 64))
    assert "evaluation" not in config.metadata


def test_published_files_name_no_folder_of_this_machine(saes, tiny_model, texts):
    for file in (*saes.glob("layers.*/cfg.json"), saes / "README.md"):
        assert str(tiny_model) not in file.read_text()
        assert str(texts.parent) not in file.read_text()
    assert load_many(saes)["layers.0"].config.metadata["data"]["dataset"] == "texts.jsonl"


def test_push_uploads_what_was_chosen(saes, monkeypatch):
    pushed = {}
    monkeypatch.setattr(commands, "push_many", lambda saes, repo_id, private: pushed.update({repo_id: saes}) or "url")
    assert "url" in run("push", "--saes", saes, "--repo_id", "me/saes", "--hookpoints", "layers.1")
    assert list(pushed["me/saes"]) == ["layers.1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--output_dir", "o"], "Pass --model ... and --dataset ..., or --store ... alone"),
        (["train", "--output_dir", "o", "--store", "missing"], "holds no activations"),
        (["train", "--output_dir", "o", "--store", "s", "--model", "m"], "--store 's' holds activations already"),
        (["train", "--output_dir", "o", "--k", "x"], "x"),
        (["train", "--output_dir", "o", "--learningrate", "1"], "Did you mean --learning"),
        (
            ["extract", "--model", "m", "--dataset", "d", "--output_dir", "o", "--dtype", "int8"],
            "--dtype 'int8'",
        ),
        (["eval", "--saes", "nowhere/at/all", "--dataset", "d"], "neither a folder nor an id"),
        (["push", "--saes", "nowhere/at/all", "--repo_id", "me/saes"], "neither a folder nor an id"),
    ],
)
def test_errors_are_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["sae", *words])
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_hookpoint_that_does_not_exist_is_named(corpus, tmp_path):
    message = run("train", *corpus, *QUICK, "--hookpoints", "layers.7", "--output_dir", tmp_path, code=1)
    assert "'layers.7' names no module" in message


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (TrainOptions, {"store": "s", "eval_share": 1.0}, "eval_share=1.0 must be at least 0 and below 1"),
        (TrainOptions, {"store": "s", "num_features": 0}, "num_features=0 must be at least 1"),
        (TrainOptions, {"store": "s", "hookpoints": ["all", "layers.1"]}, "is no choice"),
        (ExtractOptions, {"output_dir": "o", "model": "m"}, "there is no dataset. Pass dataset="),
        (ExtractOptions, {"output_dir": "o", "model": "m", "dataset": "d", "batch_size": 0}, "batch_size=0 must be"),
        (EvalOptions, {"saes": "s", "dataset": "d", "model_dtype": "int4"}, "model_dtype='int4' is unknown"),
        (BrowseOptions, {"saes": "s", "dataset": "d", "output_dir": "o", "num_examples": 0}, "num_examples=0 must"),
    ],
)
def test_impossible_options_are_named(kind, given, message):
    with pytest.raises(ValueError, match=message):
        kind(**given)
