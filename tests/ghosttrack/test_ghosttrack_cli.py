"""`hf-gradtools ghosttrack`: its commands, what they print, and how they fail."""

import json
import re

import pytest
import typer
from datasets import Dataset, load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.ghosttrack.answers.detection_rows import NEEDED, DetectionRows
from hf_gradtools.ghosttrack.answers.question_sets import QuestionSet
from hf_gradtools.ghosttrack.phases import runner
from hf_gradtools.ghosttrack.phases.common import PhaseSummary
from hf_gradtools.ghosttrack.phases.sbatch import PHASES
from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
from hf_gradtools.ghosttrack.settings.template import template_for
from tests.ghosttrack.pipeline_inputs import make_config, write_answers, write_texts


pytestmark = pytest.mark.usefixtures("datasets_cache")


def call(*words, code=0):
    result = CliRunner().invoke(app, ["ghosttrack", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def options_of(name):
    command = typer.main.get_command(app).commands["ghosttrack"].commands[name]
    return {flag for parameter in command.params for flag in parameter.opts}


def test_the_generated_job_calls_commands_that_exist():
    script = call("sbatch", "--config", "gpt2-small", "--gpus", "3", "--set", "sae.k=16")
    assert '--set "sae_training.batch_size=$TRAIN_BATCH_SIZE" --set sae.k=16' in script
    (line,) = re.findall(r"hf-gradtools ghosttrack \"\$1\" (.*) \\", script)
    assert re.findall(r"--\w+", line) == ["--config", "--layers"]
    for phase in PHASES:
        assert {"--config", "--layers", "--set", "--force"} <= options_of(phase)
        assert phase in re.findall(r"\w+", script)
    assert set(runner.FUNCTIONS) == set(PHASES)


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_gets_what_was_asked_for(monkeypatch, phase):
    seen = []

    def run(*arguments):
        seen.append(arguments)
        return PhaseSummary(phase, ["layers.1"], [], {"texts": 3})

    monkeypatch.setattr(f"hf_gradtools.ghosttrack.phases.{phase}.{runner.FUNCTIONS[phase]}", run)
    output = call(
        phase, "--config", "gpt2-small", "--layers", "1-2", "--set", "sae.k=7", "--set", "sae.k=8", "--force"
    )
    assert output == f"{phase}: made layers.1\n  texts: 3\n"
    ((config, layers, force),) = seen
    assert (config.sae.k, layers, force) == (8, "1-2", True)


def test_run_takes_all_phases_in_order(monkeypatch, tmp_path):
    write_answers(tmp_path / "answers.jsonl", 4)
    monkeypatch.setattr(runner, "run_phase", lambda phase, config, layers, force: PhaseSummary(phase, [], [layers]))
    output = call(
        "run", "--config", "gpt2-small", "--layers", "3", "--set", f"detection.dataset={tmp_path / 'answers.jsonl'}"
    )
    assert output == "".join(f"{phase}: kept 3\n" for phase in PHASES)


def test_extraction_and_training_from_the_shell(tmp_path, tiny_model):
    write_texts(tmp_path / "texts.jsonl")
    make_config(tmp_path, tiny_model)
    command = ["--config", tmp_path / "config.yaml", "--layers", "1"]
    assert "made layers.1" in call("extract", *command)
    assert "kept layers.1" in call("extract", *command)
    assert "layers.1: FVU 0." in call("train", *command, "--set", "sae_training.epochs=1")
    assert "Error: " in call("train", *command, code=1)  # trained with another number of epochs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "gpt2-smal"], "Did you mean 'gpt2-small'?"),
        (["train", "--config", "gpt2-small", "--set", "sae.kk=3"], "Did you mean sae.k"),
        (["extract", "--config", "gpt2-small"], "extraction.dataset=None names no texts"),
        (["track", "--config", "gpt2-small"], "detection.dataset=None names no labelled answers"),
        (["sbatch", "--config", "gpt2-small", "--gpus", "13"], "gpus=13 cannot share 12 layers"),
        (["questions", "--task", "guess", "--output", "x"], "task='guess' is unknown"),
        (["questions", "--task", "nq", "--output", "x"], "task='nq' needs a model that answers"),
        (["questions", "--task", "claims", "--output", "x"], "has no data set of its own"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = call(*words, code=1)
    assert message in output
    assert output.startswith("Error: ")
    assert output.count("\n") == 1


def test_an_interrupted_command_says_how_it_goes_on(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_phase", interrupted)
    assert "The same command goes on from here." in call("train", "--config", "gpt2-small", code=130)


# ---- configurations


def test_a_configuration_for_any_model(tmp_path, tiny_model):
    output = tmp_path / "new" / "mine.yaml"
    call("config", tiny_model, "--output", output)
    config = GhostTrackConfig.from_yaml(output)
    config.check_model(AutoConfig.from_pretrained(tiny_model))
    assert (config.model.base_model, config.sae.d_hidden) == (str(tiny_model), 256)
    assert config.paths.cache_dir == f"data/cache/{tiny_model.name}"
    assert call("config").startswith("# A configuration for any causal language model")


def test_names_of_models_are_quoted_where_yaml_needs_it(tmp_path, tiny_model):
    hf_config = AutoConfig.from_pretrained(tiny_model)
    for name in ("Qwen/Qwen2.5-0.5B", "it's: a #folder"):
        (tmp_path / "mine.yaml").write_text(template_for(name, hf_config))
        assert GhostTrackConfig.from_yaml(tmp_path / "mine.yaml").model.base_model == name


# ---- questions


def as_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def talking_model(tiny_model, tmp_path):
    """The tiny model, which says nothing but letters."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghij"))
    others = [token for token in range(len(tokenizer)) if token not in letters]
    model.get_output_embeddings().weight.data[others] = 0
    model.save_pretrained(tmp_path / "talking")
    tokenizer.save_pretrained(tmp_path / "talking")
    return tmp_path / "talking"


def test_answers_of_a_model(tmp_path, talking_model):
    rows = [{"question": f"{letter} 1?", "answer": list("abcdefghi")} for letter in "abcdefghij"]
    source = as_file(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "made" / "answers.jsonl"
    words = ["questions", "--task", "qa", "--dataset", source, "--model", talking_model, "--output", output]
    text = call(*words, "--wrong-per-right", "0", "--max-new-tokens", "4", "--samples", "2", "--limit", "6")
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert text == f"{len(made)} answers, {sum(row['label'] for row in made)} of them wrong  {output}\n"
    assert len(made) == 6
    assert {*NEEDED, "semantic_entropy", "generated_mean_logprob"} <= set(made[0])
    assert all(row["text"][row["answer_start"] :] == row["answer"] for row in made)
    assert "exists. Pass another" in call(*words, code=1)


def test_a_model_that_says_nothing_is_named(tmp_path, tiny_model):
    source = as_file(tmp_path / "rows.jsonl", [{"question": "a 1?", "answer": "yes"}])
    output = call("questions", "--task", "qa", "--dataset", source, "--model", tiny_model, "--output",
                  tmp_path / "made.jsonl", "--max-new-tokens", "1", code=1)  # fmt: skip
    assert "answered none of 1 questions" in output
    assert not (tmp_path / "made.jsonl").exists()


def test_claims_with_labels_and_choices(tmp_path):
    rows = [{"claim": f"{number} is even", "label": number % 2} for number in range(10)]
    call("questions", "--task", "claims", "--dataset", as_file(tmp_path / "rows.jsonl", rows), "--output",
         tmp_path / "claims", "--true-value", "0", "--limit", "6")  # fmt: skip
    made = load_from_disk(tmp_path / "claims")
    assert len(made) == 6
    assert all((int(row["answer"].split()[0]) % 2) == row["label"] for row in made)
    options = {"text": ["three", "four"], "label": ["A", "B"]}
    source = Dataset.from_list([{"question": f"2 and {n}?", "choices": options, "answerKey": "B"} for n in range(5)])
    source.save_to_disk(tmp_path / "arc")
    made = QuestionSet("arc", dataset=str(tmp_path / "arc")).make(tmp_path / "choices.jsonl")
    assert {(row["answer"], row["label"]) for row in made} == {("four", 0), ("three", 1)}
    assert len(DetectionRows.load("choices", str(tmp_path / "choices.jsonl"))) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "detection data set 'mine' has no column 'label'; it has"),
        ({"answer_start": 99}, "detection data set 'mine' has no answer in row 0"),
        ({"text": " "}, "detection data set 'mine' has no answer in row 0"),
    ],
)
def test_data_sets_without_answers_are_refused(change, message):
    rows = [{"text": "a b", "answer_start": 2, "label": label, "group": 0} | change for label in (0, 1)]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    if "label" in change:
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    elif "answer_start" not in change:
        rows = [{**row, "label": number} for number, row in enumerate(rows)]
    with pytest.raises(ValueError, match=re.escape(message)):
        DetectionRows.load("mine", Dataset.from_list(rows))
