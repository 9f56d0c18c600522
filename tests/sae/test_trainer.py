"""Training of several autoencoders from one stream: as if alone, as if never killed, and what it tells."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.extraction import extract
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.store import ActivationStore
from hf_gradtools.sae.streaming import ModelActivations
from hf_gradtools.sae.trainer import SAETrainer
from hf_gradtools.sae.training_config import SAETrainingConfig
from tests.sae import killed_training
from tests.sae.sources import TensorSource, correlated, planted
from tests.sae.tiny_models import WIDTH, llama, make_sequences


NAMES = ["layers.0", "layers.1", "layers.2"]
EVERYTHING = {"k_start": 9, "max_grad_norm": 0.1, "dead_after_tokens": 256, "epochs": 2, "bf16": True}


def training(path, **changes):
    options = {"batch_tokens": 64, "buffer_tokens": 300, "calibration_tokens": 150, "use_cpu": True}
    return SAETrainingConfig(str(path), **{**options, **changes})


def weights_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).glob("layers.*/*")}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- one pass


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SAEConfig(WIDTH, 64, k=4), {}),
        (SAEConfig(WIDTH, 64, "jumprelu", sparsity_coefficient=0.01), {}),
        (SAEConfig(WIDTH, 64, "batchtopk", k=4, matryoshka_widths=(16, 64)), EVERYTHING),
        (SAEConfig(WIDTH, 64, "gated"), EVERYTHING),
    ],
    ids=["topk", "jumprelu", "batchtopk, all options", "gated, all options"],
)
def test_all_layers_from_the_model_at_once_equal_each_alone_from_a_store(config, options, tmp_path):
    model, sequences = llama(), make_sequences(40)
    source = ModelActivations(model, sequences, NAMES, batch_size=4)
    together = SAETrainer(config, source, training(tmp_path / "all", **options)).train()
    extract(model, sequences, NAMES, tmp_path / "store", batch_size=4, progress=False)
    store = ActivationStore.open(tmp_path / "store")
    for name in NAMES:
        SAETrainer(config, store.source(name), training(tmp_path / "each", **options)).train()
    assert list(together) == NAMES
    ours, theirs = weights_of(tmp_path / "all"), weights_of(tmp_path / "each")
    assert ours.keys() == theirs.keys() == {f"{n}/{f}" for n in NAMES for f in ("cfg.json", "sae_weights.safetensors")}
    assert ours == theirs
    assert not torch.equal(together["layers.0"].W_enc, together["layers.1"].W_enc)


def test_a_hookpoint_may_have_a_configuration_of_its_own(tmp_path):
    source = TensorSource({name: correlated(512, 8, seed=i) for i, name in enumerate(NAMES)})
    configs = {"layers.1": SAEConfig(8, 24, k=2), "layers.2": SAEConfig(8, 16, "relu")}
    saes = SAETrainer(configs, source, training(tmp_path)).train()
    assert {name: (sae.config.d_sae, sae.config.hookpoint) for name, sae in saes.items()} == {
        "layers.1": (24, "layers.1"),
        "layers.2": (16, "layers.2"),
    }
    assert source.hookpoints == NAMES


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_planted_directions_are_found(activation, tmp_path):
    x, directions = planted(num_tokens=13_000, d_in=32, num_features=48, active=3, seed=7)
    options = {"batch_tokens": 128, "epochs": 6, "buffer_tokens": 13_000, "learning_rate": 5e-3}
    source, held_out = TensorSource({"layers.0": x[:12_000]}), TensorSource({"layers.0": x[12_000:]})
    config = SAEConfig(32, 128, activation, k=3)
    (sae,) = SAETrainer(config, source, training(tmp_path, **options), held_out).train().values()
    best = (directions @ sae.W_dec.detach().T).max(1).values
    evaluation = sae.config.metadata["evaluation"]
    assert float(best.mean()) > 0.9
    assert evaluation["fvu"] < 0.1
    assert evaluation["num_tokens"] == 1000
    untrained = (directions @ SAE(config, seed=0).W_dec.detach().T).max(1).values
    assert float(untrained.mean()) < 0.5


def test_few_steps_are_taken_when_max_steps_says_so(tmp_path):
    trainer = SAETrainer(
        SAEConfig(8, 16, k=2),
        TensorSource({"a": correlated(512, 8)}),
        training(tmp_path, max_steps=3, logging_steps=1),
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.log_history] == [1, 2, 3]


# ---- killed and resumed


def killed(tmp_path, kills):
    """The files of an uninterrupted run, of those that were killed, and the newest step on disk after each kill."""
    killed_training.run(tmp_path / "warm" / "saes")
    start = time.time()
    killed_training.run(tmp_path / "whole" / "saes")
    seconds = time.time() - start
    command = [sys.executable, "-m", "tests.sae.killed_training", tmp_path / "killed", kills, seconds]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = [files_of(folder) for folder in (tmp_path / "killed").iterdir()]
    return files_of(tmp_path / "whole"), resumed, list(map(int, done.stdout.split()))


def test_a_killed_and_resumed_training_gives_the_same_files(tmp_path):
    whole, resumed, steps = killed(tmp_path, kills=3)
    assert len(steps) == 3
    assert len(whole) == 3 * 3 + 1
    assert all(files == whole for files in resumed)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    whole, resumed, steps = killed(tmp_path, kills=20)
    assert len(steps) == 20
    assert sum(step > 0 for step in steps) >= 8  # killed in the midst of it
    assert len(set(steps)) >= 4
    assert all(files == whole for files in resumed)


class Stopped(Exception):
    pass


def stop_after(trainer, step):
    """Lets training end as it would by Ctrl-C at a step."""
    count = iter(range(1, 10_000))
    original = trainer._step

    def counted(learner, batch):
        if next(count) > step * len(trainer.configs):
            raise Stopped
        return original(learner, batch)

    trainer._step = counted
    with pytest.raises(Stopped):
        trainer.train(resume=True)
    return trainer


def test_files_of_different_steps_resume_at_the_newest_that_all_have(tmp_path):
    killed_training.run(tmp_path / "whole" / "saes")
    path = tmp_path / "cut" / "saes"
    stop_after(killed_training.trainer(path), 7)
    folder = path / "checkpoints"
    assert {file.name for file in (folder / "layers.0").iterdir()} == {
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    }
    (folder / "layers.2" / "step-00000006.safetensors").unlink()  # killed before it was written
    resumed = killed_training.trainer(path, logging_steps=1)
    resumed.train(resume=True)
    assert resumed.log_history[0]["step"] == 5
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_later_steps_of_a_run_without_the_others_do_not_push_out_the_common_ones(tmp_path):
    alone = killed_training.trainer(tmp_path)
    alone.configs = {"layers.0": alone.configs["layers.0"]}
    stop_after(alone, 21)
    together = killed_training.trainer(tmp_path)
    stop_after(together, 5)
    names = {path.parent.name: path.name for path in tmp_path.glob("checkpoints/*/step-00000004.safetensors")}
    assert set(names) == set(NAMES)
    resumed = killed_training.trainer(tmp_path, logging_steps=1)
    resumed.train(resume=True)
    assert resumed.log_history[0]["step"] == 5


def test_finished_hookpoints_are_not_trained_again(tmp_path):
    path = tmp_path / "saes"
    killed_training.run(path)
    before = files_of(path)
    (path / "layers.1" / "cfg.json").unlink()
    (path / "checkpoints" / "layers.1" / "finished.json").unlink()
    stale = path / "checkpoints" / "layers.0" / "step-00000038.safetensors"
    stale.write_bytes(b"a kill came before this was removed")
    trainer = killed_training.trainer(path)
    saes = trainer.train(resume=True)
    assert {name for entry in trainer.log_history for name in entry if name.endswith("/fvu")} == {"layers.1/fvu"}
    assert list(saes) == NAMES
    assert files_of(path) == before
    again = killed_training.trainer(path)
    assert list(again.train(resume=True)) == NAMES
    assert again.log_history == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"learning_rate": 1e-3, "seed": 4}, "training.learning_rate=0.000707, not 0.001; training.seed=0, not 4"),
     ({"batch_tokens": 32}, "training.batch_tokens=64, not 32")],
)  # fmt: skip
@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_named_when_resumed(changes, named, finished, tmp_path):
    if finished:
        killed_training.run(tmp_path)
    else:
        stop_after(killed_training.trainer(tmp_path), 5)
    with pytest.raises(ValueError, match=named):
        killed_training.trainer(tmp_path, **changes).train(resume=True)


def test_options_without_influence_may_change(tmp_path):
    stop_after(killed_training.trainer(tmp_path), 5)
    killed_training.trainer(tmp_path, save_steps=7, logging_steps=3, parallel="data").train(resume=True)


def test_an_earlier_training_is_not_overwritten(tmp_path):
    stop_after(killed_training.trainer(tmp_path), 5)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"earlier training of layers.0. Pass resume=True"):
        killed_training.trainer(tmp_path).train()
    assert files_of(tmp_path) == before


# ---- what it tells


class Tracker(GeneralTracker):
    name, requires_logging_directory, main_process_only = "recorder", False, True

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.ended = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.ended = True


def test_figures_are_logged_and_sent_to_trackers(tmp_path):
    source = TensorSource({name: correlated(64 * 10, 8, seed=i) for i, name in enumerate(NAMES[:2])})
    trainer = SAETrainer(
        SAEConfig(8, 48, k=2),
        source,
        training(tmp_path, logging_steps=4, dead_after_tokens=64, report_to="all", decoder_init="random"),
    )
    recorder = Tracker()
    trainer.accelerator.log_with = [recorder]
    trainer.train()
    figures = {f"{name}/{kind}" for name in NAMES[:2] for kind in ("loss", "fvu", "l0", "auxk", "dead")}
    assert [entry["step"] for entry in trainer.log_history] == [4, 8, 10]
    assert [set(entry) for entry in trainer.log_history] == 3 * [figures | {"learning_rate", "tokens", "step"}]
    assert recorder.logged == [
        (entry["step"], {k: v for k, v in entry.items() if k != "step"}) for entry in trainer.log_history
    ]
    assert recorder.config["batch_tokens"] == 64
    assert recorder.ended
    first, last = trainer.log_history[0], trainer.log_history[-1]
    assert all(0 < entry["layers.0/fvu"] < 1 for entry in (first, last))
    assert first["layers.1/l0"] <= 2
    assert 0 < last["layers.0/dead"] < 1
    assert last["tokens"] == 640


def test_the_run_is_kept_with_the_autoencoder(tmp_path):
    x = correlated(640, 8)
    held_out = TensorSource({"layers.0": correlated(200, 8, seed=0)})
    SAETrainer(SAEConfig(8, 16, k=2), TensorSource({"layers.0": x}), training(tmp_path), held_out).train()
    sae = SAE.from_pretrained(tmp_path, "layers.0")
    metadata = sae.config.metadata
    assert metadata["training"]["tokens"] == 640
    assert metadata["training"]["learning_rate"] == 0.000707  # 4e-3 times the root of 64 / 2048
    rows = held_out.activations["layers.0"]
    with torch.no_grad():
        error = (rows - sae(rows).reconstruction).square().sum() / (rows - rows.mean(0)).square().sum()
    assert metadata["evaluation"]["fvu"] == pytest.approx(float(error), rel=1e-5)
    assert "640 tokens" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "layers.0" / "cfg.json").read_text())["d_in"] == 8


# ---- bad input


def test_hidden_states_that_are_not_finite_are_named_before_anything_is_saved(tmp_path):
    x = correlated(640, 8)
    x[600] = float("nan")
    trainer = SAETrainer(SAEConfig(8, 16, k=2), TensorSource({"layers.3": x}), training(tmp_path, save_steps=100))
    with pytest.raises(FloatingPointError, match=r"hidden states at 'layers.3', step \d+ are not finite"):
        trainer.train()
    assert not (tmp_path / "layers.3").exists()


@pytest.mark.parametrize(
    ("configs", "options", "message"),
    [
        (
            SAEConfig(9, 16, k=2),
            {},
            r"d_in=9 does not fit hookpoint 'a', where hidden states have width 8. Pass SAE",
        ),
        ({"b": SAEConfig(8, 16, k=2)}, {}, "configs name b, which the source lacks; it has a"),
        (SAEConfig(8, 16, k=2), {"batch_tokens": 10_000}, "batch_tokens=10000 is more than the 640 tokens"),
    ],
)
def test_configurations_that_do_not_fit_are_named(configs, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SAETrainer(configs, TensorSource({"a": correlated(640, 8)}), training(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be positive"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction=1\.5 must lie between 0 and 1"),
        ({"parallel": "rows"}, "parallel='rows' is unknown. Pass one of layers, data"),
        ({"decoder_init": "zeros"}, "decoder_init='zeros' is unknown. Pass one of data, random"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine' is unknown. Pass one of linear, constant"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SAETrainingConfig("unused", **options)
