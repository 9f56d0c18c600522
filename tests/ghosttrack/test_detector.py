"""The detector: its verdicts against the numbers they come from, saved and loaded, and pickles that are not run."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from hf_gradtools.ghosttrack import DetectorConfig, HallucinationDetector, Method, detection_features, track
from hf_gradtools.ghosttrack.classifiers.frozen import FrozenLinear
from hf_gradtools.sae import save_many
from tests.ghosttrack.tiny_detection import FEATURES, HOOKPOINTS, load, make_detector, make_saes, make_texts


TEXTS, STARTS, LABELS, GROUPS = make_texts(40)
KINDS = ["latents", "tracks_seed", "tracks_enlarged", "latents+tracks"]


@pytest.fixture(scope="module")
def detector(tiny_model):
    return make_detector(tiny_model)


@pytest.fixture(scope="module")
def saved(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    detector.save_pretrained(folder)
    return folder


def probabilities(detector, texts=TEXTS[:6], starts=STARTS[:6]):
    return [output.probability for output in detector.predict(texts, starts)]


@pytest.mark.parametrize("features", KINDS)
def test_features_are_latents_and_numbers_about_tracks(tiny_model, features):
    detector = make_detector(tiny_model, features=features, fit=False)
    reading = detector.read(TEXTS, STARTS, progress=False)
    values, names = detector.features(reading)
    decoders = [sae.W_dec.detach().numpy() for sae in make_saes().values()]
    parts, expected_names = [], []
    if "latents" in features:
        parts += [reading.pooled[hookpoint].toarray() for hookpoint in HOOKPOINTS]
        expected_names += [f"{hookpoint}/{feature}" for hookpoint in HOOKPOINTS for feature in range(FEATURES)]
    if "tracks" in features:
        which = "seed" if features == "tracks_seed" else "enlarged"
        numbers, of_tracks = detection_features(track(reading.hypotheses, decoders), which)
        parts.append(numbers)
        expected_names += of_tracks
    np.testing.assert_allclose(values if isinstance(values, np.ndarray) else values.toarray(), np.hstack(parts))
    assert names == expected_names


@pytest.mark.parametrize("features", KINDS)
def test_contributions_add_up_to_the_logit(tiny_model, features):
    detector = make_detector(tiny_model, features=features)
    reading = detector.read(TEXTS, STARTS, progress=False)
    outputs = detector.predict(reading, top_features=10_000)
    assert isinstance(detector.classifier, FrozenLinear)
    for output in outputs:
        logit = sum(feature.contribution for feature in output.features) + float(detector.classifier.intercept)
        np.testing.assert_allclose(output.probability, 1 / (1 + np.exp(-logit)), atol=1e-9)
        sizes = [abs(feature.contribution) for feature in output.features]
        assert sizes == sorted(sizes, reverse=True)
        hallucinated = output.probability >= detector.config.threshold
        assert output.label == ("HALLUCINATED" if hallucinated else "SUPPORTED")
        assert output.score == (output.probability if hallucinated else 1 - output.probability)
    assert [output.features for output in detector.predict(reading[:2], top_features=2)] == [
        output.features[:2] for output in outputs[:2]
    ]


def test_a_signal_that_was_planted_is_found(detector):
    texts, starts, labels, _ = make_texts(60, seed=9)
    found = [output.label == "HALLUCINATED" for output in detector.predict(texts, starts)]
    assert np.mean(np.array(found) == np.array(labels)) > 0.8


@pytest.mark.parametrize(
    ("classifier", "options"),
    [("random_forest", {"n_estimators": 15}), ("gradient_boosting", {"max_iter": 15}), ("ensemble", {"C": 0.1})],
)
def test_classifiers_that_are_not_linear_tell_no_contributions(tiny_model, classifier, options, tmp_path):
    detector = make_detector(tiny_model, classifier=classifier, classifier_options={"select": 8, **options})
    assert detector.predict(TEXTS[:1], STARTS[:1])[0].features == []
    detector.save_pretrained(tmp_path)
    assert probabilities(HallucinationDetector.from_pretrained(tmp_path)) == probabilities(detector)


def test_texts_come_in_four_forms(detector):
    text = "Question : a b ? Answer : c d"
    forms = [
        {"question": "a b", "answer": "c d"},
        {"text": text, "answer_start": text.index("c d")},
        ("Question : a b ? Answer : ", "c d"),
    ]
    outputs = detector.predict(forms)
    assert outputs[0].probability == pytest.approx(probabilities(detector, [text], [text.index("c d")])[0], abs=1e-6)
    assert len({round(output.probability, 6) for output in outputs}) == 1
    assert detector.predict(text)[0].probability == probabilities(detector, [text], [0])[0]
    assert detector.predict([]) == []
    for wrong in (3, ("a", "b", "c"), {"text": "a b", "answer_start": "1"}, {"question": "a"}, ["a", "b"]):
        with pytest.raises(ValueError, match="text 1 is .*; need a text, "):
            detector.predict([text, wrong])


def test_tracks_and_plot_explain_a_verdict(detector):
    [output] = detector.predict(TEXTS[:1], STARTS[:1])
    reading = detector.read(TEXTS[:1], STARTS[:1], progress=False)
    expected = track(reading.hypotheses, [sae.W_dec.detach().numpy() for sae in make_saes().values()])
    assert list(output.tracks.of_text(0)) == list(expected.of_text(0))
    assert output.span == tuple(reading.spans[0])
    assert output.plot().startswith("<svg")
    steps = output.to_dict()["tracks"][0]
    assert set(steps[0]) == {"layer", "feature", "activation", "position"}
    json.dumps(output.to_dict())
    [bare] = detector.predict(TEXTS[:1], STARTS[:1], with_tracks=False)
    assert bare.probability == output.probability
    assert not {"tracks", "plot"} & set(bare.to_dict())
    with pytest.raises(ValueError, match="the text was not tracked"):
        bare.plot()


def test_forward_gives_the_log_probabilities_of_both_labels(detector):
    tokenizer = detector.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS[:5], return_tensors="pt", padding=True)
    begins = torch.tensor([len(tokenizer(text[:start]).input_ids) for text, start in zip(TEXTS, STARTS, strict=True)])
    logits = detector(batch.input_ids, batch.attention_mask, begins[:5]).logits
    expected = torch.tensor(probabilities(detector)[:5])
    torch.testing.assert_close(logits.exp()[:, 1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(5))
    with pytest.raises(ValueError, match="row 0 of input_ids has 1 tokens"):
        detector(batch.input_ids[:, :1])


# ---- saved, loaded, measured


@pytest.mark.parametrize("features", ["latents", "latents+tracks"])
def test_a_detector_comes_back(tiny_model, features, tmp_path):
    detector = make_detector(tiny_model, features=features, classifier_options={"select": 20})
    detector.save_pretrained(tmp_path / "new")
    for again in (
        HallucinationDetector.from_pretrained(tmp_path / "new"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "new"),
        HallucinationDetector.from_pretrained(tmp_path / "new", causal_lm=detector.causal_lm),
    ):
        assert isinstance(again, HallucinationDetector)
        assert probabilities(again) == probabilities(detector)
        assert again.config.to_diff_dict() == detector.config.to_diff_dict()
    endings = {path.suffix for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert endings == {".json", ".safetensors", ".md"}


def test_maps_between_layers_are_saved(tiny_model, tmp_path):
    map_ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype(np.float32)
    detector = make_detector(tiny_model, [map_], features="tracks_enlarged", tracking={"similarity": "transported"})
    detector.save_pretrained(tmp_path)
    again = HallucinationDetector.from_pretrained(tmp_path)
    assert (again.maps[0] == map_).all()
    assert probabilities(again) == probabilities(detector)
    with pytest.raises(ValueError, match="maps belong to tracking"):
        make_detector(tiny_model, fit=False, tracking={"similarity": "transported"})
    (tmp_path / "tracking_maps.safetensors").unlink()
    with pytest.raises(ValueError, match="tracking_maps.safetensors is missing"):
        HallucinationDetector.from_pretrained(tmp_path)


def test_autoencoders_may_have_a_repository_of_their_own(tiny_model, tmp_path):
    save_many(make_saes(), tmp_path / "saes")
    detector = make_detector(tiny_model, sae_repo=str(tmp_path / "saes"))
    detector.save_pretrained(tmp_path / "detector")
    assert not (tmp_path / "detector" / "saes").exists()
    assert probabilities(HallucinationDetector.from_pretrained(tmp_path / "detector")) == probabilities(detector)


def test_settings_can_be_changed_when_loading(saved, detector):
    strict = HallucinationDetector.from_pretrained(saved, threshold=1.0, dtype=torch.bfloat16)
    assert {output.label for output in strict.predict(TEXTS[:6], STARTS[:6])} == {"SUPPORTED"}
    assert strict.causal_lm.dtype == torch.bfloat16
    np.testing.assert_allclose(probabilities(strict), probabilities(detector), atol=0.1)


def test_the_card_tells_what_was_measured(tiny_model, tmp_path):
    detector = make_detector(tiny_model)
    detector.save_pretrained(tmp_path)
    assert "Not measured." in (tmp_path / "README.md").read_text()
    reading = detector.read(TEXTS, STARTS, progress=False)
    length = Method("answer length", reading.hypotheses.lengths.astype(float), None)
    result = detector.evaluate(reading, LABELS, GROUPS, baselines=[length], n_folds=4, resamples=50)
    detector.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    own, other = result.table
    assert card.data.eval_results[0].metric_value == pytest.approx(own.auroc.estimate, abs=1e-4)
    assert f"| detector | {own.auroc.estimate:.3f} | {own.auroc.low:.3f} – {own.auroc.high:.3f} |" in card.text
    assert f"| answer length | {other.auroc.estimate:.3f} |" in card.text
    difference = result.differences("answer length")["detector"]
    assert f"| answer length | {difference.estimate:+.3f} | {difference.low:+.3f}" in card.text
    assert "40 texts, 20 questions kept whole in 4 folds" in card.text
    assert str(tiny_model) not in card.content
    assert HallucinationDetector.from_pretrained(tmp_path).config.metrics == detector.config.metrics
    detector.fit(reading, LABELS, GROUPS)
    assert detector.config.metrics == {}  # they were of another classifier


# ---- what is refused


def test_parts_that_do_not_fit_are_named(tiny_model, detector):
    model, tokenizer = load(tiny_model)
    config = DetectorConfig(model_name="user/model")
    with pytest.raises(ValueError, match="saes is empty"):
        HallucinationDetector(config)
    with pytest.raises(ValueError, match=r"saes\['layers.0'\] has d_in=16 .* d_model=32"):
        HallucinationDetector(config, make_saes(width=16), model, tokenizer)
    with pytest.raises(ValueError, match="are not those of hookpoints"):
        HallucinationDetector(DetectorConfig(hookpoints=["layers.1", "layers.0"]), make_saes())
    swapped = dict(zip(HOOKPOINTS, reversed(make_saes().values()), strict=True))
    with pytest.raises(ValueError, match=r"saes\['layers.0'\] is an autoencoder of hookpoint='layers.1'"):
        HallucinationDetector(DetectorConfig(), swapped)
    unfitted = HallucinationDetector(DetectorConfig(), make_saes())
    with pytest.raises(ValueError, match="no causal_lm or no tokenizer"):
        unfitted.read(TEXTS)
    reading = detector.read(TEXTS, STARTS, progress=False)
    for call in (lambda: unfitted.predict(reading), lambda: unfitted.save_pretrained("nowhere")):
        with pytest.raises(ValueError, match="the detector is not fitted"):
            call()
    with pytest.raises(ValueError, match=r"labels"):
        unfitted.fit(reading, [1] * len(TEXTS), GROUPS)
    narrow = HallucinationDetector(DetectorConfig(), {"layers.0": make_saes()["layers.0"]})
    with pytest.raises(ValueError, match=r"the reading is of \{'layers.0': 24, 'layers.1': 24\}; the detector reads"):
        narrow.features(reading)
    with pytest.raises(ValueError, match="text 1 is empty, or its answer is: ''"):
        detector.predict([TEXTS[0], ""])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "everything"}, "features='everything' is unknown"),
        ({"scope": "prompt"}, "scope='prompt' is unknown"),
        ({"threshold": 1.5}, "threshold=1.5 is no probability"),
        ({"max_tokens": 1}, "max_tokens=1 leaves no token"),
        ({"prompt_template": "{question}"}, "must name {question} once and end with its one {answer}"),
        ({"classifier": "oracle"}, "classifier='oracle' is unknown"),
        ({"classifier_options": {"c": 1}}, "has no option 'c'"),
        ({"tracking": {"similarity": "coactivation"}}, "its statistics are not saved"),
        ({"tracking": {"topk": 3}}, "tracking has no field 'topk'"),
        ({"hookpoints": ["layers.0", "layers.0"]}, "names one twice"),
        ({"id2label": {0: "yes"}}, "must name the labels 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig(**options)


def test_a_detector_whose_model_nobody_else_has_is_not_pushed(detector):
    with pytest.raises(ValueError, match=r"config.model_name='.*' is no Hub id"):
        detector.push_to_hub("user/detector")


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def evil(tmp_path):
    """A pickle, and the file that appears if it is run."""
    content = pickle.dumps(Evil(tmp_path / "executed"))
    pickle.loads(pickle.dumps(Evil(tmp_path / "works"))).close()
    assert (tmp_path / "works").exists()
    yield content
    assert not (tmp_path / "executed").exists()


def files_of_a_detector(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_pickle_in_place_of_any_file_is_refused_and_not_run(saved, evil, tmp_path):
    names = files_of_a_detector(saved)
    assert len(names) >= 10
    for name in names:
        folder = tmp_path / "detector"
        shutil.copytree(saved, folder)
        (folder / name).write_bytes(evil)
        if name.endswith(".md"):
            HallucinationDetector.from_pretrained(folder)  # nobody reads cards
        else:
            with pytest.raises(ValueError, match=rf"{folder}.*(Pass|Save|Copy)"):
                HallucinationDetector.from_pretrained(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["detector.pkl", "detector.joblib", "detector.skops", "detector.pt", "detector.bin"])
def test_a_pickle_offered_as_a_detector_is_refused_and_not_run(evil, tmp_path, name):
    (tmp_path / "offered").mkdir()
    (tmp_path / "offered" / name).write_bytes(evil)
    with pytest.raises(ValueError, match=f"{name} may run code when it is loaded, so it is not opened"):
        HallucinationDetector.from_pretrained(tmp_path / "offered" / name)
    with pytest.raises(ValueError, match=f"no config.json of a detector; {name} may run code"):
        HallucinationDetector.from_pretrained(tmp_path / "offered")


def test_pickles_beside_or_instead_of_parts_are_not_run(saved, evil, tmp_path, detector):
    folder = tmp_path / "detector"
    shutil.copytree(saved, folder)
    for name in ("pytorch_model.bin", "classifier.pkl", "tokenizer.pkl", "saes/layers.0/sae_weights.pt"):
        (folder / name).write_bytes(evil)
    assert probabilities(HallucinationDetector.from_pretrained(folder)) == probabilities(detector)
    (folder / "classifier.json").unlink()
    with pytest.raises(ValueError, match=r"no classifier.json; classifier.pkl in its place may run code"):
        HallucinationDetector.from_pretrained(folder)
    shutil.copy(saved / "classifier.json", folder)
    (folder / "saes" / "layers.0" / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"sae_weights.pt.* a pickle can run code, and is not opened|layers.0"):
        HallucinationDetector.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_in_the_language_models_place_is_not_run(saved, evil, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(evil)
    with pytest.raises(ValueError, match="offers weights that could run code when they are loaded, so they are not"):
        HallucinationDetector.from_pretrained(saved, causal_lm=str(tmp_path / "model"))


def test_folders_that_hold_no_whole_detector_are_named(saved, tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"is of model_type='llama'; a detector's is 'hallucination_detector'"):
        HallucinationDetector.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match="is neither a folder nor an id of the Hub"):
        HallucinationDetector.from_pretrained(tmp_path / "absent" / "far" / "away")
    folder = tmp_path / "detector"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "saes" / "layers.1")
    with pytest.raises(ValueError, match="layers.1"):
        HallucinationDetector.from_pretrained(folder)
    shutil.rmtree(folder / "saes")
    with pytest.raises(ValueError, match="has no autoencoders in 'saes', and sae_repo is None"):
        HallucinationDetector.from_pretrained(folder)
    shutil.copytree(saved / "saes", folder / "saes")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no whole tokenizer"):
        HallucinationDetector.from_pretrained(folder)


def test_a_classifier_of_other_autoencoders_is_refused(saved, tmp_path):
    folder = tmp_path / "detector"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hookpoints": ["layers.0"]}))
    with pytest.raises(ValueError, match="a classifier of 48 features and autoencoders of 24"):
        HallucinationDetector.from_pretrained(folder)
