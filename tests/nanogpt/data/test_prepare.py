"""From text to token files: the reference is what nanoGPT's prepare.py does, in three lines."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_gradtools.nanogpt.data import TokenFolder, prepare, sources
from hf_gradtools.nanogpt.data.cli import main
from hf_gradtools.nanogpt.data.prepare import _new_folder, _TokenWriter


TEXT = "Ça ira!  \n\n😀 The end of\tit.\n" * 400


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return str(path)


def read(folder: TokenFolder) -> np.ndarray:
    return np.concatenate([folder.tokens("train"), folder.tokens("val")])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 50)


@pytest.mark.usefixtures("small_pieces")
def test_characters_as_nanogpt_numbers_and_splits_them(text_file, tmp_path):
    made = prepare(text_file, tmp_path / "out")
    characters = sorted(set(TEXT))
    expected = [characters.index(c) for c in TEXT]
    assert read(made).tolist() == expected
    assert made.tokens("train").tolist() == expected[: int(len(TEXT) * 0.9)]
    assert made.meta == {
        "dtype": "uint8", "vocab_size": len(characters), "tokenizer": "char",
        "train_tokens": int(len(TEXT) * 0.9), "val_tokens": len(TEXT) - int(len(TEXT) * 0.9),
        "files": sorted(path.name for path in made.path.iterdir()),
    }  # fmt: skip
    assert made.tokenizer.decode(read(made)[:100]) == TEXT[:100]
    made.check_ids()


def test_bytes_of_any_file(tmp_path):
    data = bytes(range(256)) * 20 + b"\r\n\xff"
    (tmp_path / "any.bin").write_bytes(data)
    made = prepare(str(tmp_path / "any.bin"), tmp_path / "out", "byte")
    assert read(made).tobytes() == data
    assert made.vocab_size == 256


def bpe(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.usefixtures("small_pieces")
def test_cutting_a_file_into_pieces_does_not_change_its_tokens(text_file, tmp_path):
    tokenizer = bpe(tmp_path / "bpe", 300)
    made = prepare(text_file, tmp_path / "out", str(tmp_path / "bpe"))
    assert read(made).tolist() == tokenizer(TEXT)["input_ids"]
    assert made.dtype == np.uint16
    assert made.meta["tokenizer"] == "bpe"
    assert made.vocab_size == len(tokenizer)


@pytest.mark.usefixtures("small_pieces")
def test_lines_that_end_as_on_windows_are_not_cut_within_words(tmp_path):
    backend = Tokenizer(models.WordLevel({"<u>": 0, "words": 1}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "words")
    (tmp_path / "input.txt").write_text("words\r\n" * 1000, newline="")
    made = prepare(str(tmp_path / "input.txt"), tmp_path / "out", str(tmp_path / "words"))
    assert read(made).tolist() == [1] * 1000


def test_rows_end_with_the_tokenizer_s_end_of_text(tmp_path):
    tokenizer = bpe(tmp_path / "bpe", 270)
    rows = [f"row {i} of it" for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))
    made = prepare(str(tmp_path / "rows.jsonl"), tmp_path / "out", str(tmp_path / "bpe"))
    end = tokenizer.eos_token_id
    assert read(made).tolist() == [i for row in rows for i in [*tokenizer(row)["input_ids"], end]]
    chars = prepare(str(tmp_path / "rows.jsonl"), tmp_path / "chars", separator="|")
    assert chars.tokenizer.decode(read(chars)) == "".join(row + "|" for row in rows)


def test_validation_text_of_its_own_and_several_files(tmp_path):
    for name, text in (("a.txt", "abab"), ("b.txt", "ba"), ("v.txt", "abc")):
        (tmp_path / name).write_text(text)
    made = prepare(
        [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tmp_path / "out", val_inputs=str(tmp_path / "v.txt")
    )
    assert made.tokens("train").tolist() == [0, 1, 0, 1, 1, 0]
    assert made.tokens("val").tolist() == [0, 1, 2]


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_dtype_is_the_narrowest_that_holds_every_id(size, dtype):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(size)})))
    assert _TokenWriter(tokenizer, "").dtype == np.dtype(dtype)


def test_ids_of_a_tokenizer_that_leaves_some_out_are_kept(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<u>": 1, "b": 300}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "words")
    (tmp_path / "input.txt").write_text("a b " * 10)
    made = prepare(str(tmp_path / "input.txt"), tmp_path / "out", str(tmp_path / "words"))
    assert read(made).tolist() == [0, 300] * 10
    assert made.vocab_size == 301


def test_character_that_a_tokenizer_has_not_is_named_with_its_line(text_file, tmp_path):
    prepare(text_file, tmp_path / "first")
    (tmp_path / "more.txt").write_text("The end\nof itß\n")
    with pytest.raises(ValueError, match=r"line 2 of .*more.txt has the character 'ß' \(U\+00DF\)"):
        prepare(str(tmp_path / "more.txt"), tmp_path / "second", str(tmp_path / "first"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "input.txt", "more.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0 must lie between 0 and 1"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": "missing.txt"}, "there is no file 'missing.txt'"),
        ({"tokenizer": "./missing"}, "tokenizer='./missing' cannot be loaded"),
        ({"val_fraction": 0.99999}, "both need some"),
    ],
)  # fmt: skip
def test_wrong_arguments_leave_nothing_behind(change, message, text_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare(**{"inputs": text_file, "out_dir": tmp_path / "out", **change})
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_text_that_is_no_utf8_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(ValueError, match="byte 0xE9, .* tokenizer='byte'"):
        prepare(str(tmp_path / "latin.txt"), tmp_path / "out")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is an empty file"):
        prepare(str(tmp_path / "empty.txt"), tmp_path / "out")


def test_an_existing_folder_is_replaced_only_on_request(text_file, tmp_path):
    prepare(text_file, tmp_path / "out")
    with pytest.raises(ValueError, match="exists. Pass another folder, or overwrite=True"):
        prepare(text_file, tmp_path / "out", "byte")
    assert prepare(text_file, tmp_path / "out", "byte", overwrite=True).vocab_size == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.txt", "out"]


@pytest.mark.parametrize("others", [["input.txt"], ["train.bin", "val.bin", "meta.pkl"], ["mine/train.bin"]])
def test_what_prepare_did_not_make_is_never_replaced(others, text_file, tmp_path):
    for name in others:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("abc")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="exists and holds .*Pass another folder.$"):
            prepare(text_file, tmp_path / "data", overwrite=overwrite)
    assert all((tmp_path / "data" / name).read_text() == "abc" for name in others)


def test_a_file_put_beside_the_dataset_is_kept(text_file, tmp_path, monkeypatch):
    made = prepare(text_file, tmp_path / "out")
    write = _TokenWriter.write
    monkeypatch.setattr(
        _TokenWriter, "write", lambda *given: (made.path / "notes.md").write_text("mine") and write(*given)
    )
    with pytest.raises(ValueError, match=r"holds 'notes.md'"):
        prepare(text_file, tmp_path / "out", overwrite=True)
    assert (made.path / "notes.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input.txt", "out"]


def killed_prepare(text_file, out_dir):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    _TokenWriter.write = die
    prepare(text_file, out_dir)


def test_a_killed_run_leaves_no_folder_and_does_not_disturb_the_next(text_file, tmp_path):
    child = multiprocessing.get_context("fork").Process(target=killed_prepare, args=(text_file, tmp_path / "out"))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with _new_folder(tmp_path / "out", True) as live:
        assert prepare(text_file, tmp_path / "out").vocab_size == len(set(TEXT))
        assert sorted(path.name for path in tmp_path.iterdir()) == [live.parent.name, "input.txt", "out"]


def test_command_line(text_file, tmp_path, capsys):
    main(["--inputs", text_file, "--out_dir", str(tmp_path / "out"), "--tokenizer", "byte", "--no-overwrite"])
    assert "256 ids, uint8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--inputs", text_file, "--out_dir", str(tmp_path / "out")])
    assert "Error: --out-dir '" in capsys.readouterr().err
