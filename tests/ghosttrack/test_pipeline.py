"""`pipeline("hallucination-detection")` from a folder and from a Hub on loopback, in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_gradtools.ghosttrack import HallucinationDetectionPipeline, HallucinationDetector
from tests.ghosttrack.tiny_detection import load, make_detector, make_saes, make_texts
from tests.hub_stub import HubStub


ROOT = Path(__file__).parents[2]
TASK = "hallucination-detection"
QUESTION = {"question": "a b", "answer": "c d"}
TEXTS, STARTS, _, _ = make_texts(7)
EXAMPLES = [{"text": text, "answer_start": start} for text, start in zip(TEXTS, STARTS, strict=True)]

# The user's program, whole: nothing of ours is named but the package.
PROGRAM = """
import sys
{imports}
detect = pipeline("hallucination-detection", model=sys.argv[1], device="cpu")
import json
print(json.dumps(detect([{{"question": "a b", "answer": "c d"}}, "a b c d"])))
"""
ORDERS = {
    "ours first": "import hf_gradtools\nassert 'transformers' not in sys.modules\nfrom transformers import pipeline",
    "transformers first": "from transformers import pipeline\nimport hf_gradtools",
    "pipelines first": "import transformers.pipelines\nfrom transformers import pipeline\nimport hf_gradtools",
}
PUSH = """
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

for kind in (AutoModelForCausalLM, AutoTokenizer):
    kind.from_pretrained(detect.model.config.model_name).push_to_hub("user/model")
detect.model.config.model_name = "user/model"
detect.model.push_to_hub("user/detector", commit_message="the detector")
"""


@pytest.fixture(scope="module")
def detector(tiny_model):
    return make_detector(tiny_model)


@pytest.fixture(scope="module")
def saved(detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    detector.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detect(detector):
    return pipeline(TASK, model=detector, device="cpu")


def run(program, *arguments, **options):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def check(printed, detector):
    found = json.loads(printed.splitlines()[-1])
    for result, output in zip(found, detector.predict([QUESTION, "a b c d"]), strict=True):
        assert result["probability"] == pytest.approx(output.probability, abs=1e-6)
        assert result["label"] == output.label
        assert result["plot"].startswith("<svg")
        assert result["tracks"]


@pytest.mark.parametrize("order", [pytest.param(order, marks=pytest.mark.slow) for order in ORDERS])
def test_it_loads_from_a_folder_whatever_is_imported_first(saved, detector, order):
    check(run(PROGRAM.format(imports=ORDERS[order]), saved), detector)


def test_it_loads_in_a_fresh_process_from_a_folder_and_from_the_hub_where_it_was_pushed(
    tiny_model, saved, detector, tmp_path
):
    with HubStub() as hub:
        program = PROGRAM.format(imports=ORDERS["pipelines first"]) + PUSH
        check(run(program, saved, env=hub.environ(tmp_path / "one")), detector)
        files = hub.files("user/detector")
        hub.repos["user/detector"].append(files | {"pytorch_model.bin": b"never downloaded", "handler.py": b"1/0"})
        printed = run(PROGRAM.format(imports=ORDERS["ours first"]), "user/detector", env=hub.environ(tmp_path / "two"))
        check(printed, detector)
        asked = [request for request in hub.requests if "/user/detector/resolve/" in request]
    assert json.loads(files["config.json"])["model_name"] == "user/model"
    assert str(tiny_model).encode() not in b"".join(files.values())
    assert b"base_model: user/model" in files["README.md"]
    assert b'pipeline("hallucination-detection", model="user/detector")' in files["README.md"]
    assert any("classifier.safetensors" in request for request in asked)
    assert not any(request.endswith((".bin", ".py")) for request in asked)


def test_the_task_is_listed_among_transformers_own():
    assert TASK in PIPELINE_REGISTRY.get_supported_tasks()


def test_results_are_the_detectors(detect, detector):
    assert isinstance(detect, HallucinationDetectionPipeline)
    [output] = detector.predict([EXAMPLES[0]])
    assert detect(EXAMPLES[0]) == output.to_dict()
    assert set(detect(QUESTION)) == {"label", "score", "probability", "span", "features", "tracks", "plot"}
    assert detect((TEXTS[0][: STARTS[0]], TEXTS[0][STARTS[0] :])) == output.to_dict()
    assert detect(TEXTS[0])["probability"] == detector.predict([TEXTS[0]])[0].probability


def test_parameters_go_to_the_call_or_to_the_pipeline(detect, detector):
    assert set(detect(QUESTION, return_tracks=False)) == {"label", "score", "probability", "span", "features"}
    assert "plot" not in detect(QUESTION, plot=False)
    assert len(detect(QUESTION, top_features=3)["features"]) == 3
    short = pipeline(TASK, model=detector, device="cpu", return_tracks=False, top_features=1)
    assert set(short(QUESTION)) == {"label", "score", "probability", "span", "features"}
    assert len(short(QUESTION)["features"]) == 1
    assert "tracks" in short(QUESTION, return_tracks=True)
    with pytest.raises(TypeError, match=r"top_k is no parameter .* it has return_tracks, plot and top_features"):
        detect(QUESTION, top_k=3)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_lists_datasets_and_generators_are_read_in_batches(detect, detector, batch_size, monkeypatch):
    expected = [output.probability for output in detector.predict(EXAMPLES)]
    sizes, predict = [], type(detector).predict

    def counting(self, texts, *args, **kwargs):
        sizes.append(len(texts))
        return predict(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(detector), "predict", counting)
    for inputs in (EXAMPLES, (example for example in EXAMPLES), Dataset.from_list(EXAMPLES)):
        sizes.clear()
        found = [result["probability"] for result in detect(inputs, batch_size=batch_size)]
        assert found == pytest.approx(expected, abs=1e-6)
        assert max(sizes) == min(batch_size, len(EXAMPLES))
    assert detect([]) == []


def test_it_comes_back_from_its_own_save_pretrained(detect, tmp_path):
    detect.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert again(QUESTION)["probability"] == detect(QUESTION)["probability"]
    lowered = pipeline(TASK, model=str(tmp_path), device="cpu", model_kwargs={"threshold": 0.0}, dtype=torch.bfloat16)
    assert lowered(QUESTION)["label"] == "HALLUCINATED"
    assert lowered.model.causal_lm.dtype == torch.bfloat16


def test_what_cannot_be_judged_is_named(detect, tiny_model):
    with pytest.raises(ValueError, match="text 1 is 3; need a text"):
        detect(["a b", 3])
    with pytest.raises(ValueError, match="text 1 is empty"):
        detect([QUESTION, {"question": "a b", "answer": " "}])
    with pytest.raises(ValueError, match="batch_size=0 is no number"):
        list(detect([QUESTION], batch_size=0))
    model, tokenizer = load(tiny_model)
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; the task 'hallucination-detection' needs"):
        pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu")
    unfitted = HallucinationDetector(make_detector(tiny_model, fit=False).config, make_saes(), model, tokenizer)
    with pytest.raises(ValueError, match="the detector is not fitted"):
        pipeline(TASK, model=unfitted, device="cpu")(QUESTION)
