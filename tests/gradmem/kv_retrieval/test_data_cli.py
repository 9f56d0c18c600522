"""`hf-gradtools gradmem data` from words to a folder; what is wrong is told in one line."""

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.gradmem.kv_retrieval import KVRetrievalConfig, generate_kv_dataset
from tests.gradmem.kv_retrieval.reading import check_row


NAME = "N3-K2V2-S2(8-20)-V70"


def data(*words):
    return CliRunner().invoke(app, ["gradmem", "data", *map(str, words)])


def test_a_folder_of_rows_and_their_tokenizer(tmp_path):
    out = tmp_path / NAME
    done = data("--name", NAME, "--num", "1_200", "--valid-rows", 30, "--seed", 7, "--num_proc", 2, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"{NAME}: 1,200 rows of train, 30 rows of valid and the tokenizer in {out}" in done.output
    splits = load_from_disk(out)
    assert splits["train"][:] == generate_kv_dataset(NAME, 1200, seed=7)[:]
    check_row(splits["valid"][29], KVRetrievalConfig.from_name(NAME))
    tokenizer = AutoTokenizer.from_pretrained(out)
    context = splits["train"][0]["context"]
    assert len(tokenizer) == 78
    assert tokenizer.decode(tokenizer(context).input_ids) == context


def test_a_name_may_tell_the_rows(tmp_path):
    done = data("--name", "N2-K1V1-V4_12", "--valid_rows", 1, "--out", tmp_path / "kv")
    assert "N2-K1V1-V4: 12 rows of train" in done.output
    assert len(load_from_disk(tmp_path / "kv")["train"]) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "N2"], "--name 'N2' is no name of a task"),
        (["--name", "N9-K1V1-V4"], "num_pairs=9 needs as many different keys"),
        (["--name", NAME], "num_rows is missing"),
        (["--name", NAME, "--num", "many"], "--num 'many' is no number of rows"),
        (["--name", NAME, "--num", "-3"], "--num '-3' is no number of rows"),
        (["--name", NAME, "--num", "5", "--valid_rows", "0"], "--valid-rows '0' is no number of rows"),
        (["--name", NAME, "--num", "5", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["--name", NAME, "--num", "5", "--num_proc", "0"], "--num-proc 0 must be at least 1"),
        (["--name", NAME, "--num", "5", "--out", "."], "--out '.' is there already"),
        (["--name", NAME, "--nom", "5"], "Did you mean --num"),
        ([], "required: --name"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    done = data(*words, *([] if "--out" in words else ["--out", "kv"]))
    output = done.output + capfd.readouterr().err
    assert done.exit_code in (1, 2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(tmp_path.iterdir())
