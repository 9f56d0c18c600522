"""The five phases on a tiny model: a whole run, kills anywhere, changed settings, memory that does not suffice."""

import importlib
import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch

from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector
from hf_gradtools.ghosttrack.evaluation.comparison import ABLATIONS, LATENTS, PROBE
from hf_gradtools.ghosttrack.phases import common, evaluate, track
from hf_gradtools.ghosttrack.phases.dashboard import choose_cases
from hf_gradtools.ghosttrack.phases.detect import detector_folder
from hf_gradtools.ghosttrack.phases.runner import run_phase, run_pipeline
from hf_gradtools.ghosttrack.reading import reading_files
from hf_gradtools.ghosttrack.tracking import track_files
from hf_gradtools.sae import trainer as sae_trainer
from hf_gradtools.sae.checkpoints import LearnerCheckpoints
from tests.ghosttrack.pipeline_inputs import (
    QUESTIONS,
    RIGHT,
    WRONG,
    files_below,
    make_config,
    write_answers,
    write_texts,
)


PHASES = ("extract", "train", "track", "detect", "evaluate")
TIMED = {"dashboard.html"}  # says when it was made


@pytest.fixture(scope="module", autouse=True)
def _datasets_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A finished run: its folder, configuration and summaries. Not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    write_texts(folder / "texts.jsonl")
    write_answers(folder / "answers.jsonl")
    config = make_config(folder, tiny_model)
    return folder, config, run_pipeline(config)


@pytest.fixture
def copied(run, tmp_path, tiny_model):
    """Makes a configuration in a new folder that already has some of the finished run's folders."""

    def copy(*folders, **sections):
        for name in folders:
            shutil.copytree(run[0] / name, tmp_path / name)
        return make_config(tmp_path, tiny_model, run[0], **sections)

    return copy


def assert_same_files(config, run, *folders):
    here = files_below(config.tracking_folder.parents[1])
    there = files_below(run[0])
    names = [name for name in there if name.startswith(folders) and name.rpartition("/")[2] not in TIMED]
    assert names
    assert [name for name in here if name.startswith(folders) and name.rpartition("/")[2] not in TIMED] == names
    assert not [name for name in names if here[name] != there[name]]


def interrupted_at(monkeypatch, owner, name, call):
    """Makes the so many-th call of a function end like Ctrl-C, before it does anything."""
    original, count = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


# ---- a whole run


def test_a_run_makes_everything(run):
    folder, config, summaries = run
    assert [summary.phase for summary in summaries] == list(PHASES)
    assert [summary.done for summary in summaries] == [
        ["layers.0", "layers.1"], ["layers.0", "layers.1"], ["answers"], ["answers (latents)"], ["answers"],
    ]  # fmt: skip
    assert not any(summary.skipped for summary in summaries)
    assert re.fullmatch(r"FVU 0\.\d+, L0 4\.0", summaries[1].facts["layers.1"])
    for layer in (0, 1):
        assert (config.hidden_states_folder(layer) / "manifest.json").exists()
        assert (config.checkpoints_folder(layer) / "sae_weights.safetensors").exists()
    assert {path.name for path in (folder / "results/tracking/answers").glob("tracks-*")} == {
        f"tracks-{kind}.safetensors" for kind in ("hungarian", "shuffled", "random", "none")
    }


def test_the_comparison_has_all_methods_and_differences(run):
    result = json.loads((run[0] / "results/evaluation/answers/evaluation.json").read_bytes())
    methods = {row["method"]: row["auroc"]["estimate"] for row in result["table"]}
    assert {"answer length", "mean log-probability", "perplexity", PROBE, LATENTS} <= set(methods)
    assert "P(True)" not in methods  # the tokenizer has no such words
    assert {name for pair in ABLATIONS for name in pair} <= set(methods)
    assert methods[LATENTS] > 0.95  # the first letter: a signal that is in the hidden states
    assert methods["answer length"] < 0.6
    assert result["baseline"] == PROBE
    assert set(result["differences"]) == set(methods) - {PROBE}
    assert [(row["method"], row["minus"]) for row in result["ablations"]] == list(ABLATIONS)
    assert {row["category"] for row in result["category_table"]} == {"early", "late"}
    table = (run[0] / "results/evaluation/answers/evaluation.md").read_text()
    assert f"| {LATENTS} |" in table
    assert "no tracking" in (run[0] / "results/evaluation/answers/dashboard.html").read_text()


def test_the_detector_can_be_used(run, tiny_model):
    detector = HallucinationDetector.from_pretrained(detector_folder(run[1], "answers", "latents"))
    right, wrong = detector.predict(
        [{"text": f"Question: a 3 b? Answer: {word} c", "answer_start": 25} for word in (RIGHT, WRONG)]
    )
    assert right.probability < detector.config.threshold <= wrong.probability
    assert detector.config.metrics["n_groups"] == QUESTIONS


def test_a_second_run_does_nothing(run, monkeypatch):
    monkeypatch.setattr("hf_gradtools.ghosttrack.phases.common.open_model", None)  # not even this
    before = files_below(run[0])
    summaries = run_pipeline(run[1])
    assert not any(summary.done for summary in summaries)
    assert [len(summary.skipped) for summary in summaries] == [2, 2, 1, 1, 1]
    assert files_below(run[0]) == before
    assert str(summaries[0]).startswith("extract: kept layers.0, layers.1")


def test_layers_one_by_one_are_those_of_all_at_once(run, copied):
    config = copied()
    for phase in ("extract", "train"):
        for layers in ("1", 0):
            assert run_phase(phase, config, layers).done == [f"layers.{layers}"]
    assert_same_files(config, run, "cache", "models/layers", "models/checkpoints")


# ---- killed


def test_training_that_was_killed_goes_on(run, copied, monkeypatch):
    config = copied("cache")
    with monkeypatch.context() as patch:
        interrupted_at(patch, LearnerCheckpoints, "save", 3)
        with pytest.raises(KeyboardInterrupt):
            run_phase("train", config)
    assert list(config.checkpoints_folder().glob("checkpoints/*/step-*"))
    assert run_phase("train", config).done == ["layers.0", "layers.1"]
    assert_same_files(config, run, "models/layers", "models/checkpoints")


@pytest.mark.parametrize("place", ["read", "save_tracks", "finish"])
def test_tracking_that_was_killed_goes_on(run, copied, monkeypatch, place):
    config = copied("models")
    with monkeypatch.context() as patch:
        if place == "read":
            interrupted_at(patch, reading_files, "_write", 1)
        elif place == "save_tracks":
            interrupted_at(patch, track_files, "save_tracks", 3)
        else:
            interrupted_at(patch, track, "finish", 1)
        with pytest.raises(KeyboardInterrupt):
            run_phase("track", config)
    with pytest.raises(ValueError, match="holds no finished tracks. Run `hf-gradtools ghosttrack track`"):
        run_phase("detect", config)
    assert run_phase("track", config).done == ["answers"]
    assert_same_files(config, run, "results/tracking")


def test_evaluation_that_was_killed_goes_on(run, copied, monkeypatch):
    config = copied("models", "results")
    folder = config.evaluation_folder / "answers"
    for name in ("finished.json", "evaluation.json", "dashboard.html", "methods/02-perplexity.json"):
        (folder / name).unlink()
    (folder / "methods/05-sae-latents-all-layers.json").write_text('{"identity": "of other settings"}')
    module = importlib.import_module("hf_gradtools.ghosttrack.evaluation.cross_validation")
    with monkeypatch.context() as patch:
        interrupted_at(patch, module, "cross_validate", 2)
        with pytest.raises(KeyboardInterrupt):
            run_phase("evaluate", config)
    assert (folder / "methods/02-perplexity.json").exists()
    calls, original = [], module.cross_validate
    monkeypatch.setattr(
        module, "cross_validate", lambda methods, *a, **k: calls.append(methods[0].name) or original(methods, *a, **k)
    )
    assert run_phase("evaluate", config).done == ["answers"]
    assert calls == [LATENTS]
    assert_same_files(config, run, "results/evaluation")


# ---- what is wrong


def test_a_wrong_width_is_named(copied):
    config = copied("cache", "models", model={"d_model": 16}, sae={"d_model": 16})
    with pytest.raises(ValueError, match="sae.d_model=16 does not fit .*layers.0, where hidden states have width 32"):
        run_phase("train", config)
    with pytest.raises(ValueError, match=r"model.d_model=16 is not what .* has. Write d_model: 32 below model and"):
        run_phase("track", config)
    shutil.rmtree(config.hidden_states_folder())
    with pytest.raises(ValueError, match=r"model.d_model=16 is not what .* has. Write d_model: 32 below model and"):
        run_phase("extract", config)


def test_a_damaged_shard_is_named_with_its_layer(copied, caplog):
    config = copied("cache")
    (shard,) = config.hidden_states_folder(1).glob("*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"layers\.1 is damaged: shard-00000-00000.arrow"):
        run_phase("train", config)
    assert run_phase("train", config, "0").done == ["layers.0"]


def test_labels_of_one_kind_are_refused_before_anything_runs(copied, tmp_path):
    config = copied(detection={"dataset": str(write_answers(tmp_path / "alike.jsonl", label=1))})
    with pytest.raises(ValueError, match="data set 'alike': label has 0 rows of label 0 and 80 of label 1"):
        run_pipeline(config)
    assert not config.hidden_states_folder().exists()


@pytest.mark.parametrize(("phase", "needs"), [("train", "extract"), ("track", "train"), ("evaluate", "train")])
def test_a_phase_says_which_one_it_needs(copied, phase, needs):
    with pytest.raises(ValueError, match=f"Run `hf-gradtools ghosttrack {needs}`"):
        run_phase(phase, copied())


def test_unknown_phases_and_layers_are_refused(run):
    with pytest.raises(ValueError, match="phase='guess' is unknown. Pass one of extract, train"):
        run_phase("guess", run[1])
    with pytest.raises(ValueError, match="layers='2' goes beyond layer 1"):
        run_phase("extract", run[1], "2")


# ---- other settings


@pytest.mark.parametrize(
    ("phase", "changed", "named"),
    [
        ("extract", {"extraction": {"dtype": "float32"}}, "dtype='bfloat16', not 'float32'"),
        ("train", {"sae_training": {"learning_rate": 0.01}}, "training.learning_rate=0.001, not 0.01"),
        ("track", {"tracking": {"birth": 0.1}}, "tracking.birth=0.0, not 0.1"),
        ("detect", {"detection": {"classifier": "random_forest"}}, "classifier=None, not 'random_forest'"),
        ("evaluate", {"evaluation": {"folds": 4}}, "folds="),
    ],
)
def test_changed_settings_are_named(copied, phase, changed, named):
    config = copied("cache", "models", "results", **changed)
    with pytest.raises(ValueError, match=re.escape(named)):
        run_phase(phase, config)


def test_force_makes_it_anew(run, copied):
    config = copied("cache", "models", "results")
    weights = config.checkpoints_folder(1) / "sae_weights.safetensors"
    kept = config.checkpoints_folder(0) / "sae_weights.safetensors"
    times = [file.stat().st_mtime_ns for file in (weights, kept)]
    assert run_phase("train", config, "1", force=True).done == ["layers.1"]
    assert weights.stat().st_mtime_ns > times[0]
    assert kept.stat().st_mtime_ns == times[1]
    assert run_phase("extract", config, force=True).done == ["layers.0", "layers.1"]
    assert_same_files(config, run, "cache", "models/layers")


def test_other_layers_have_results_of_their_own(copied):
    config = copied("models", evaluation={"ablations": False})
    assert run_phase("track", config, "1").done == ["answers"]
    assert (config.tracking_folder / "answers" / "layers-1" / "tracks-hungarian.safetensors").exists()
    assert run_phase("detect", config, "1").done == ["answers (latents)"]
    assert (config.detection_folder / "answers" / "layers-1" / "latents" / "classifier.json").exists()


@pytest.mark.parametrize("similarity", ["transported", "coactivation"])
def test_other_similarities(run, copied, similarity):
    config = copied("cache", "models", tracking={"similarity": similarity}, evaluation={"ablations": False})
    run_phase("track", config)
    found = track.load_tracked(config, config.hookpoints, "answers").tracks["hungarian"].tracks
    decoder = track.load_tracked(run[1], run[1].hookpoints, "answers").tracks["hungarian"].tracks
    assert (found.previous >= 0).any()
    assert not np.allclose(found.similarity, decoder.similarity)


def test_several_data_sets_and_detectors(copied, tmp_path):
    sources = [str(write_answers(tmp_path / f"{name}.jsonl", 8)) for name in ("one", "two")]
    config = copied(
        "models",
        detection={"dataset": sources, "features": ["latents+tracks", "tracks_enlarged"]},
        evaluation={"ablations": False},
    )
    assert run_phase("track", config).done == ["one", "two"]
    assert run_phase("detect", config).done == [
        f"{name} ({features})" for name in ("one", "two") for features in config.detectors
    ]
    assert (config.detection_folder / "two" / "latents_and_tracks" / "config.json").exists()


# ---- memory


def test_training_takes_fewer_layers_then_smaller_batches(run, copied, monkeypatch, caplog):
    config = copied("cache")
    original, asked = sae_trainer.SAETrainer.train, []

    def train(self, resume=False):
        asked.append((list(self.configs), self.args.batch_tokens))
        if len(self.configs) > 1 or self.args.batch_tokens > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return original(self, resume)

    monkeypatch.setattr(sae_trainer.SAETrainer, "train", train)
    limit = 100
    with caplog.at_level(logging.WARNING):
        run_phase("train", config)
    assert asked == [(["layers.0", "layers.1"], 100), (["layers.0"], 100), (["layers.1"], 100)]
    assert "out of memory with 2 layers at once; going on with 1" in caplog.text
    assert_same_files(config, run, "models/layers", "models/checkpoints")

    asked.clear()
    limit = 50
    run_phase("train", config, "1", force=True)
    assert asked == [(["layers.1"], 100), (["layers.1"], 50)]
    assert "in batches of 100 tokens; beginning layers.1 again with 50" in caplog.text
    asked.clear()
    assert run_phase("train", config, "1").skipped == ["layers.1"]
    assert asked == [(["layers.1"], 50)]


def test_extraction_says_how_many_sequences_fitted(copied, monkeypatch, caplog):
    from hf_gradtools.sae import streaming

    original = streaming.run

    def run(model, hookpoints, **inputs):
        if len(inputs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, hookpoints, **inputs)

    monkeypatch.setattr(streaming, "run", run)
    config = copied()
    with caplog.at_level(logging.WARNING):
        assert run_phase("extract", config).facts["sequences at once"] == 4
    assert caplog.text.count("out of memory at") == 2  # 16 and 8, once


# ---- parts


def test_cases_are_the_surest_of_each_kind():
    labels = np.array([1, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.95, 0.1, 0.2, 0.05, 0.8])
    assert choose_cases(labels, scores, 0.5, 4) == [1, 2, 4, 5]  # found, missed, passed, accused
    assert choose_cases(labels, scores, 0.5, 99) == [1, 2, 4, 5, 0, 3]


def test_a_finished_mark_that_is_damaged_is_named(tmp_path):
    common.finish(tmp_path, {"a": 1}, {})
    assert common.is_finished(tmp_path, {"a": 1})
    (tmp_path / "finished.json").write_text("{")
    with pytest.raises(ValueError, match=r"finished.json is damaged .* Delete it"):
        common.is_finished(tmp_path, {"a": 1})


def test_work_that_was_begun_goes_on_with_the_same_settings_only(tmp_path):
    folder = tmp_path / "made"
    for _ in range(2):
        common.begin(folder, {"a": (1, 2)})
    with pytest.raises(ValueError, match=r"made was made with other settings \(a=.*Pass force=True"):
        common.begin(folder, {"a": (1, 3)})
    common.finish(folder, {"a": (1, 2)}, {})
    assert [path.name for path in folder.iterdir()] == ["finished.json"]
    (folder / "begun.json").write_text("{")
    with pytest.raises(ValueError, match=r"begun.json is damaged .* Delete "):
        common.begin(folder, {"a": (1, 2)})


@pytest.mark.parametrize(
    ("phase", "kept", "changed"),
    [
        ("track", "tracks-hungarian.safetensors", {"tracking": {"birth": 0.1}}),
        ("evaluate", "scalars.safetensors", {"evaluation": {"bootstrap_samples": 40}}),
    ],
)
def test_what_a_killed_run_left_is_not_taken_for_other_settings(copied, phase, kept, changed):
    config = copied("models", "results", **changed)
    folder = getattr(config, {"track": "tracking_folder", "evaluate": "evaluation_folder"}[phase]) / "answers"
    identity = common.read_finished(folder)["identity"]
    (folder / "finished.json").unlink()
    (folder / "begun.json").write_text(json.dumps(identity))
    assert (folder / kept).exists()
    with pytest.raises(ValueError, match="was made with other settings"):
        run_phase(phase, config)


def test_dashboards_are_written_again(run, copied):
    config = copied("models", "results")
    (config.evaluation_folder / "answers" / "dashboard.html").unlink()
    (path,) = evaluate.write_dashboards(config)
    assert "GhostTrack on answers" in path.read_text()
