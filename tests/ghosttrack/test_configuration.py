"""Configurations: the shipped files, strict reading, overrides, the check against a model."""

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig

from hf_gradtools.ghosttrack.detection.configuration_detector import FEATURES
from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig, find_config, shipped_configs
from hf_gradtools.ghosttrack.settings.layer_selection import format_layers, parse_layers, split_layers
from hf_gradtools.ghosttrack.settings.sections import CHOICES, SEED_SAE_OVERRIDES, TrackingConfig


MINIMAL = {
    "model": {"base_model": "m", "d_model": 8, "n_layers": 4},
    "sae": {"d_model": 8, "d_hidden": 64},
    "paths": {"cache_dir": "c", "models_dir": "m", "results_dir": "r"},
}


def write(tmp_path, changes=(), text=None):
    content = {section: dict(values) for section, values in MINIMAL.items()}
    for section, values in dict(changes).items():
        content.setdefault(section, {}).update(values)
    path = tmp_path / "mine.yaml"
    path.write_text(text or yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("name", "n_layers", "d_model", "d_hidden", "extract", "train"),
    [("gpt2-small", 12, 768, 4096, 32, 256), ("gpt2-medium", 24, 1024, 5120, 16, 128)],
)
def test_gpt2_files_say_what_the_seed_says(name, n_layers, d_model, d_hidden, extract, train):
    config = GhostTrackConfig.from_yaml(name)
    assert (config.model.n_layers, config.model.d_model, config.sae.d_model) == (n_layers, d_model, d_model)
    assert (config.sae.d_hidden, config.extraction.batch_size, config.sae_training.batch_size) == (
        d_hidden,
        extract,
        train,
    )
    assert (config.extraction.max_length, config.sae_training.n_tokens, config.sae_training.epochs) == (512, 10**7, 20)
    training = config.sae_training
    assert (training.learning_rate, training.max_grad_norm) == (1e-4, 1.0)
    tracking = config.tracking
    assert tracking == TrackingConfig()
    assert (tracking.weights, tracking.top_k, tracking.accept, tracking.birth) == ((0.6, 0.2, 0.2), 50, 0.5, 0.5)
    assert (tracking.association, tracking.similarity) == ("hungarian", "decoder")
    assert (config.sae.activation, config.sae.k) == ("topk", 32)


def test_folders_are_the_seeds():
    config = GhostTrackConfig.from_yaml("gpt2-small")
    assert config.hidden_states_folder().as_posix() == "data/cache/gpt2-small/hidden_states"
    assert config.hidden_states_folder(5).as_posix() == "data/cache/gpt2-small/hidden_states/layers.5"
    assert config.checkpoints_folder().as_posix() == "models/checkpoints/gpt2-small"
    assert config.checkpoints_folder(5).as_posix() == "models/checkpoints/gpt2-small/layers.5"
    results = [config.tracking_folder, config.detection_folder, config.evaluation_folder]
    assert [folder.as_posix() for folder in results] == [
        f"results/gpt2-small/{phase}" for phase in ("tracking", "detection", "evaluation")
    ]


def test_every_shipped_file_loads_and_survives_writing(tmp_path):
    assert {"gpt2-small", "gpt2-medium", "smollm2-135m", "template"} == set(shipped_configs())
    for name in shipped_configs():
        config = GhostTrackConfig.from_yaml(name)
        text = config.to_yaml(tmp_path / "new" / f"{name}.yaml")
        assert (tmp_path / "new" / f"{name}.yaml").read_text() == text
        assert GhostTrackConfig.from_yaml(tmp_path / "new" / f"{name}.yaml") == config


def test_the_template_shows_every_key_with_its_default(tmp_path):
    shown = yaml.safe_load(find_config("template").read_text())
    defaults = GhostTrackConfig.from_yaml(write(tmp_path)).to_dict()
    assert {name: list(keys) for name, keys in shown.items()} == {
        name: sorted(keys, key=list(shown[name]).index) for name, keys in defaults.items()
    }
    for name, keys in defaults.items():
        needed = MINIMAL.get(name, {})
        assert {key: shown[name][key] for key in keys if key not in needed} == {
            key: value for key, value in keys.items() if key not in needed
        }


def test_the_seeds_sae_can_be_asked_for():
    config = GhostTrackConfig.from_yaml("gpt2-small", SEED_SAE_OVERRIDES)
    sae = config.sae.to_config("gpt2")
    assert (sae.activation, sae.shared_threshold, sae.threshold) == ("jumprelu", True, 0.1)
    assert (sae.sparsity_penalty, sae.d_in, sae.d_sae, sae.model_name) == ("l1", 768, 4096, "gpt2")
    assert sae.sparsity_coefficient * sae.d_sae == pytest.approx(0.01)  # of the mean over all features
    training = config.sae_training.to_config("out", config.sae_training.batch_size)
    assert (training.batch_tokens, training.epochs, training.learning_rate) == (256, 20, 1e-4)
    assert (training.max_grad_norm, training.normalize_input, training.lr_scheduler_type) == (1.0, False, "constant")


def test_every_training_key_reaches_the_trainer(tmp_path):
    changed = {"epochs": 3, "learning_rate": 0.5, "max_grad_norm": None, "lr_scheduler_type": "constant",
               "warmup_fraction": 0.3, "decay_start": 0.4, "normalize_input": False, "bf16": True,
               "buffer_tokens": 77, "dead_after_tokens": 66, "save_steps": 55, "seed": 4}  # fmt: skip
    config = GhostTrackConfig.from_yaml(write(tmp_path, {"sae_training": changed}))
    training = config.sae_training.to_config("out", 12)
    assert {name: getattr(training, name) for name in changed} == changed
    assert set(config.to_dict()["sae_training"]) == {*changed, "n_tokens", "batch_size", "holdout"}


def test_feature_sets_are_those_of_a_detector():
    assert CHOICES["detection.features"] == FEATURES


def test_data_sets_have_names(tmp_path):
    config = GhostTrackConfig.from_yaml(write(tmp_path, {"detection": {"dataset": ["a/nq.jsonl", "b/trivia"]}}))
    assert config.datasets == {"nq": "a/nq.jsonl", "trivia": "b/trivia"}
    with pytest.raises(ValueError, match="two of one name"):
        _ = GhostTrackConfig.from_yaml(write(tmp_path, {"detection": {"dataset": ["a/nq.jsonl", "b/nq"]}})).datasets
    with pytest.raises(ValueError, match="detection.dataset=None names no labelled answers"):
        _ = GhostTrackConfig.from_yaml(write(tmp_path)).datasets


def test_smollm2_file_fits_the_model():
    GhostTrackConfig.from_yaml("smollm2-135m").check_model(LlamaConfig(hidden_size=576, num_hidden_layers=30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": {"d_hiden": 4}}, "mine.yaml: sae.d_hiden=4 is no known key. Did you mean sae.d_hidden?"),
        ({"trackings": {"top_k": 4}}, "mine.yaml: trackings={'top_k': 4} is no known key. Did you mean tracking?"),
        ({"sae": {"k": "many"}}, "mine.yaml: sae.k='many' is of type str; need an integer."),
        ({"sae": {"k": True}}, "mine.yaml: sae.k=True is of type bool; need an integer."),
        ({"sae": {"k": 3.0}}, "mine.yaml: sae.k=3.0 is of type float; need an integer."),
        ({"sae": {"shared_threshold": 1}}, "mine.yaml: sae.shared_threshold=1 is of type int; need true or false."),
        ({"extraction": {"layers": [0, "1"]}}, "need a text or an integer or a list of integers."),
        ({"sae": {"k": 0}}, "mine.yaml: sae.k=0 is out of range; need more than 0."),
        ({"sae_training": {"learning_rate": float("nan")}}, "learning_rate=nan is out of range"),
        ({"sae": {"k": 65}}, "mine.yaml: sae.k=65 is more than sae.d_hidden=64 features."),
        ({"sae": {"d_model": 9}}, "mine.yaml: sae.d_model=9 is not model.d_model=8;"),
        ({"tracking": {"association": "magic"}}, "mine.yaml: tracking.association='magic' is not known; need one of"),
        ({"tracking": {"matching": "greedy"}}, "mine.yaml: tracking.matching='greedy' is no known key."),
        ({"tracking": {"birth": -1}}, "mine.yaml: tracking.birth=-1.0 must be a finite number"),
        ({"sae": {"sparsity_penalty": "l0"}}, "mine.yaml: sae.sparsity_penalty='l0' has a gradient for"),
        ({"sae_training": {"holdout": 1.0}}, "sae_training.holdout=1.0 is not below 1. Write 0.02."),
        ({"detection": {"features": ["latents", "latents"]}}, "detection.features=['latents', 'latents'] is empty or"),
        ({"detection": {"features": ["latent"]}}, "detection.features=['latent'] is unknown; need one of latents"),
        ({"sae": {"activation": "tanh"}}, "sae.activation='tanh' is unknown; need one of topk, batchtopk, jumprelu"),
        ({"evaluation": {"folds": 1}}, "evaluation.folds=1 leaves nothing to train on"),
        ({"evaluation": {"confidence": 95}}, "evaluation.confidence=95.0 is not below 1. Write 0.95."),
        ({"extraction": {"layers": "0-4"}}, "extraction.layers='0-4' goes beyond layer 3, the last of 4."),
        ({"paths": {"cache_dir": ""}}, "paths.cache_dir='' is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GhostTrackConfig.from_yaml(write(tmp_path, changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {base_model: m, d_model: 8}\nsae: {d_model: 8, d_hidden: 9}\npaths: {}", "model.n_layers is missing"),
        ("model: {base_model: m, d_model: 8, n_layers: 2}", "mine.yaml: sae is missing; there is model."),
        ("model: 3", "mine.yaml: sae is missing"),
        ("model: 3\nsae: 3\npaths: 3", "mine.yaml: model=3 is not a section"),
        ("- a", "mine.yaml: holds ['a']; need sections"),
        ("a: [", "mine.yaml: not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "mine.yaml: not YAML"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GhostTrackConfig.from_yaml(write(tmp_path, text=text))


def test_numbers_as_people_write_them(tmp_path):
    text = write(tmp_path).read_text() + "sae_training: {learning_rate: 1e-3, max_grad_norm: 1, n_tokens: 10_000}\n"
    training = GhostTrackConfig.from_yaml(write(tmp_path, text=text)).sae_training
    assert (training.learning_rate, training.max_grad_norm, training.n_tokens) == (1e-3, 1.0, 10_000)


def test_overrides_apply_in_order(tmp_path):
    overrides = [
        "sae.k=3",
        "extraction.layers=[0, 2]",
        "sae.k=5",
        "tracking.association=none",
        "detection.dataset=a=b",
    ]
    config = GhostTrackConfig.from_yaml(write(tmp_path), overrides)
    assert (config.sae.k, config.layers, config.hookpoints) == (5, [0, 2], ["layers.0", "layers.2"])
    assert (config.tracking.association, config.detection.dataset) == ("none", "a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sae.kk=3",
            "override 'sae.kk=3' sets no known key; write section.key=value, such as sae.k=64. Did you mean sae.k",
        ),
        ("sae.k", "override 'sae.k' sets no known key"),
        ("sae=3", "override 'sae=3' sets no known key"),
        ("sae.k=x", "override 'sae.k=x': sae.k='x' is of type str; need an integer."),
        ("sae.k=[", "override 'sae.k=[' has no YAML value"),
    ],
)
def test_bad_overrides_are_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GhostTrackConfig.from_yaml(write(tmp_path), [override])


def test_unknown_names_get_a_suggestion():
    with pytest.raises(FileNotFoundError, match="config='gpt2-smal' is no file .* Did you mean 'gpt2-small'"):
        GhostTrackConfig.from_yaml("gpt2-smal")
    with pytest.raises(FileNotFoundError, match="no file"):
        GhostTrackConfig.from_yaml("elsewhere/gpt2-small")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (GPT2Config(n_embd=768, n_layer=12), None),
        (
            GPT2Config(n_embd=1024, n_layer=24),
            "model.d_model=768, model.n_layers=12 is not what 'openai-community/gpt2' (gpt2) has. "
            "Write d_model: 1024, n_layers: 24 below model and the same d_model below sae.",
        ),
        (LlamaConfig(hidden_size=768, num_hidden_layers=30), "Write n_layers: 30 below model."),
    ],
)
def test_a_model_of_another_shape_is_named(model, message):
    config = GhostTrackConfig.from_yaml("gpt2-small")
    if message is None:
        config.check_model(model)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            config.check_model(model)


def test_without_yaml_the_extra_is_named():
    code = (
        "import sys; sys.modules['yaml'] = None\n"
        "from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig\n"
        "try: GhostTrackConfig.from_yaml('gpt2-small')\n"
        "except ImportError as error: print(error)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'hf_gradtools[ghosttrack]'" in process.stdout, process.stderr


@pytest.mark.parametrize(
    ("selection", "layers"),
    [("all", [0, 1, 2, 3, 4]), ("1-3", [1, 2, 3]), ("4, 0-1", [0, 1, 4]), (2, [2]), ("2", [2]), ([3, 1], [1, 3])],
)
def test_layer_selections(selection, layers):
    assert parse_layers(selection, 5) == layers


@pytest.mark.parametrize("selection", ["", "3-1", "a", "1-", "-1", "1,,2", "0-1,1", "5", [], [-1], [True], [0, 0]])
def test_bad_layer_selections_are_refused(selection):
    with pytest.raises(ValueError, match=re.escape(f"layers={selection!r}")):
        parse_layers(selection, 5)


@given(st.sets(st.integers(0, 60), min_size=1), st.data())
def test_layers_split_evenly_and_written_layers_read_back(layers, data):
    layers = sorted(layers)
    groups = split_layers(layers, data.draw(st.integers(1, len(layers))))
    assert [layer for group in groups for layer in parse_layers(format_layers(group), 61)] == layers
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
