import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_gradtools import load_ghost_dataset
from hf_gradtools.cli import app
from hf_gradtools.workflow.data import hold_out, load_rows, number_rows
from hf_gradtools.workflow.tokenizing import RowFormat, tokenize_rows


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
VOCABULARY = ["</s>", "<unk>", ":", *NUMBERS, "plus", "is", "what", "user", "assistant"]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def question(i):
    return {"question": f"what is {NUMBERS[i % 10]} plus one", "answer": NUMBERS[(i + 1) % 10]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(question(i)) + "\n" for i in range(12)))
    return str(path)


def run(*args):
    return CliRunner().invoke(app, ["ghost", *map(str, args)])


@pytest.fixture
def train(model, dataset, tmp_path):
    """Trains 3 steps on 8 of 12 rows, unless told otherwise."""

    def train(*args, dataset=dataset, out=tmp_path / "out"):
        shared = ["--model", model, "--dataset", dataset, "--output-dir", out, "--batch-size", 3]
        return run("train", *shared, *([] if "--val" in args else ["--val", 4]), *args)

    return train


def refusal(result):
    """The one line that a refused command says."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if "Error" in line]
    assert len(lines) == 1, result.output
    return lines[0]


def test_train_leaves_rows_texts_model_and_report(train, tmp_path):
    result = train("--per-layer", "--grad-norms", "--sample-losses")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    rows = load_ghost_dataset(out / "ghost")
    texts = {row["id"]: row["text"] for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines())}
    assert set(rows["sample_id"]) == set(texts)
    assert len(rows) == len(texts) == 8
    assert texts[rows["sample_id"][0]].startswith("what is")
    assert {"layer_dot_products", "grad_norm", "cosine", "sample_loss"} <= set(rows.column_names)
    assert "what is" in (out / "report.html").read_text()
    assert (out / "adapter_model.safetensors").exists()


def test_train_says_what_it_does_and_lists_samples(train, tmp_path):
    output = train().stdout
    assert "LoRA of rank 16" in output
    assert "8 rows of" in output
    assert "prompts in question, responses in answer" in output
    assert "Most helpful (change of the loss on 'validation'" in output
    assert "what is" in output
    assert f"report  {tmp_path / 'out' / 'report.html'}" in output


def test_full_training_on_text_with_several_validation_sets(train, tmp_path):
    text = tmp_path / "more.txt"
    text.write_text("one plus two\n\nis three\n")
    sets = ["--val", "held=4", "--val", f"more={text}"]
    result = train("--full", "--max-steps", 2, "--second-order", "--optimizer-aware", *sets)
    assert result.exit_code == 0, result.output
    assert "all weights" in result.stdout
    assert "4 rows of held, 2 rows of more" in result.stdout
    assert {"value/held", "second_order/more"} <= set(load_ghost_dataset(tmp_path / "out" / "ghost").column_names)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_report_is_written_anew_with_fewer_sets_and_samples(train, tmp_path):
    train("--val", "a=4", "--val", "b=2", "--max-steps", 1)
    html = tmp_path / "b.html"
    result = run("report", tmp_path / "out", "--html", html, "--top-k", 1, "--val", "b")
    assert result.exit_code == 0, result.output
    assert "'b'" in result.stdout
    assert "'a'" not in result.stdout
    assert 1 <= html.read_text().count("what is") <= 2  # of the 3 samples scored: one that helps, one that harms
    assert "it has a, b" in refusal(run("report", tmp_path / "out", "--val", "c")).lower()


def test_report_works_while_training_runs(train, tmp_path, monkeypatch):
    outputs = []

    def report_too(self, args, state, control, **kwargs):
        if state.global_step == 2:
            outputs.append(run("report", tmp_path / "out").stdout)

    monkeypatch.setattr("hf_gradtools.ghost.train._WriteFiles.on_step_end", report_too)
    assert train().exit_code == 0
    assert "report.html" in outputs[0]


def test_resume_after_a_crash_gives_the_rows_of_an_unbroken_run(train, tmp_path, monkeypatch):
    def crash(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("hf_gradtools.ghost.train._WriteFiles.on_step_end", crash)
        assert "disk full" in refusal(train("--save-steps", 1))
    assert "Continue it by --resume" in refusal(train("--save-steps", 1))
    assert "--seed 0, not 1" in refusal(train("--resume", "--seed", 1))
    assert train("--save-steps", 1, "--resume").exit_code == 0
    assert train(out=tmp_path / "unbroken").exit_code == 0
    resumed, unbroken = (load_ghost_dataset(tmp_path / name / "ghost") for name in ("out", "unbroken"))
    columns = ["step", "sample_id", "dot_product"]
    assert resumed.select_columns(columns).to_dict() == unbroken.select_columns(columns).to_dict()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text-column", "body"], "--text-column 'body' is no column of it. It has question, answer"),
        (["--prompt-column", "question"], "name either the text column, or both"),
        (["--val", "0"], "--val 0 holds out 0 of 12 rows"),
        (["--val", "nope.jsonl"], "no file 'nope.jsonl'"),
        (["--val", "2", "--val", "3"], "Name each: --val name=2"),
        (["--split", "test"], "cannot be read"),
        (["--model", "nowhere/nothing"], "--model 'nowhere/nothing' cannot be loaded"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--method", "magic"], "--method 'magic' is unknown"),
        (["--dtype", "int3"], "--dtype 'int3' is unknown"),
        (["--layers", "conv"], "--layers 'conv' matches no module"),
        (["--resume"], "holds no run to continue"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(train, tmp_path, args, message):
    assert message in refusal(train(*args))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 rows"),
        ('{"a": 1', "cannot be read"),
        ('{"a": "x", "b": "y"}\n', "a, b do not tell what to train on"),
        ('{"text": ["x"]}\n', "column 'text' holds ['x'], a list; text is needed"),
        ('{"text": ""}\n{"text": " "}\n', "nothing is left"),
        ('{"messages": [{"role": "user", "content": "one"}]}\n', "no chat template"),
    ],
)
def test_data_that_cannot_be_trained_on_is_told_in_one_line(train, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert message in refusal(train("--val", path))


def test_report_of_a_folder_without_run(tmp_path):
    assert "holds no run" in refusal(run("report", tmp_path))


@pytest.mark.parametrize("saved", ["csv", "parquet", "json", "disk", "splits"])
def test_every_kind_of_source_is_read(tmp_path, saved):
    rows, path = Dataset.from_list([question(i) for i in range(3)]), tmp_path / f"rows.{saved}"
    if saved == "splits":
        DatasetDict(train=rows, test=rows).save_to_disk(path)
    else:
        getattr(rows, "save_to_disk" if saved == "disk" else f"to_{saved}")(path)
    assert load_rows(str(path)).to_list() == rows.to_list()


def test_columns_are_recognised():
    assert RowFormat.detect(["id", "text"]) == RowFormat(text="text")
    assert RowFormat.detect(["review"]) == RowFormat(text="review")
    assert RowFormat.detect(["messages", "prompt"]) == RowFormat(messages="messages")
    alpaca = RowFormat.detect(["instruction", "input", "output"])
    assert alpaca == RowFormat(prompt=("instruction", "input"), response="output")
    assert RowFormat.detect(["text", "a", "b"], prompt=["a"], response="b") == RowFormat(prompt=("a",), response="b")


def test_held_out_rows_keep_their_ids_and_order():
    rest, held = hold_out(number_rows(Dataset.from_dict({"text": list("abcdefgh")})), 0.25, seed=1)
    assert len(held) == 2
    assert sorted(rest["sample_id"][:] + held["sample_id"][:]) == list(range(8))
    assert rest["sample_id"][:] == sorted(rest["sample_id"])
    assert ["abcdefgh"[i] for i in held["sample_id"]] == held["text"][:]


def learnt(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_loss_counts_the_response_and_the_end(tokenizer):
    rows = number_rows(Dataset.from_list([question(1)]))
    row = tokenize_rows(rows, tokenizer, RowFormat(prompt=("question",), response="answer"))[0]
    assert tokenizer.decode(row["input_ids"]) == "what is two plus one three </s>"
    assert learnt(tokenizer, row) == "three </s>"
    assert row["text"] == "what is two plus one\n\nthree"


def test_loss_counts_every_turn_of_the_assistant(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    turns = [("user", "what"), ("assistant", "one"), ("user", "plus"), ("assistant", "two")]
    rows = Dataset.from_list([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    row = tokenize_rows(number_rows(rows), tokenizer, RowFormat.detect(rows.column_names))[0]
    assert tokenizer.decode(row["input_ids"]) == (
        "user : what </s> assistant : one </s> user : plus </s> assistant : two </s>"
    )
    assert learnt(tokenizer, row) == "one </s> two </s>"


def test_rows_without_anything_to_learn_are_left_out(tokenizer, caplog):
    rows = Dataset.from_dict({"question": ["one " * 9, "one", "two"], "answer": ["two", "", "three"]})
    row_format = RowFormat.detect(rows.column_names)
    tokenized = tokenize_rows(number_rows(rows), tokenizer, row_format, max_length=8)
    assert tokenized["sample_id"][:] == [2]
    assert "2 of 3 rows have no text to learn within max_length=8 tokens" in caplog.text
