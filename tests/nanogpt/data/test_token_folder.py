"""Folders of token files: ours, nanoGPT's, broken ones, and the ready set."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource

import numpy as np
import pytest

from hf_gradtools.nanogpt.data import TokenFolder
from hf_gradtools.nanogpt.data.shakespeare import shakespeare_char


def write(folder, dtype="<u2", meta=None, pickled=None, train=range(30), val=range(20)):
    folder.mkdir()
    for name, ids in (("train", train), ("val", val)):
        np.asarray(list(ids), dtype).tofile(folder / f"{name}.bin")
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    if pickled is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(pickled) if not isinstance(pickled, bytes) else pickled)
    return folder


def test_folder_of_nanogpt_opens_with_its_own_ids(tmp_path):
    characters = [chr(ord("A") + i) for i in range(26)] + list("\n 😀z")
    stoi = {c: i for i, c in enumerate(characters)}  # not sorted: the ids of the pickle count
    meta = {"vocab_size": 30, "stoi": stoi, "itos": dict(enumerate(characters))}
    data = TokenFolder(write(tmp_path / "d", pickled=meta))
    assert data.vocab_size == 30
    assert data.dtype == np.uint16
    assert data.tokenizer.decode(data.tokens("train")) == "".join(characters)
    assert data.tokenizer("Z\n😀")["input_ids"] == [25, 26, 28]
    assert sorted(path.name for path in data.path.iterdir()) == ["meta.pkl", "train.bin", "val.bin"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), (100_277, "uint32")])
def test_a_vocabulary_too_large_for_uint16_is_read_as_nanogpt_wrote_it(vocab_size, dtype, tmp_path):
    ids = np.arange(vocab_size - 50, vocab_size)
    folder = write(tmp_path / "d", dtype, pickled={"vocab_size": vocab_size}, train=ids, val=ids)
    assert TokenFolder(folder).tokens("train").tolist() == ids.tolist()


@pytest.mark.parametrize("stoi", [{"ab": 0, "c": 1}, {"a": 0, "b": 2}, {"a": 0, "b": "1"}])
def test_tokens_that_are_no_characters_do_without_a_tokenizer(stoi, tmp_path):
    data = TokenFolder(write(tmp_path / "d", pickled={"vocab_size": 30, "stoi": stoi}))
    assert not data.has_tokenizer
    with pytest.raises(ValueError, match="has no tokenizer. Save the one that made the ids there"):
        _ = data.tokenizer


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_asks_for_code_is_refused_and_not_run(protocol, tmp_path):
    payload = pickle.dumps({"vocab_size": 30, "stoi": Touch(tmp_path / "touched")}, protocol=protocol)
    with pytest.raises(ValueError, match=r"open, and only plain containers are read. Nothing of it was executed"):
        TokenFolder(write(tmp_path / "d", pickled=payload))
    assert not (tmp_path / "touched").exists()
    pickle.loads(payload)  # the payload would have worked
    assert (tmp_path / "touched").exists()


HUGE = b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b"x."  # says that so many bytes follow


SPARSE = b"\x80\x02Nr" + (1 << 28).to_bytes(4, "little") + b"."  # has an entry of that number


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", HUGE, SPARSE, pickle.dumps([1]), pickle.dumps({"vocab_size": "x"})]
)
def test_a_broken_pickle_is_told(content, tmp_path):
    folder = write(tmp_path / "d", pickled=content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"meta\.pkl"):
        TokenFolder(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1 << 20)  # KiB


def test_a_pickle_too_large_for_a_vocabulary_is_not_read(tmp_path):
    folder = write(tmp_path / "d", pickled={"vocab_size": 30})
    os.truncate(folder / "meta.pkl", 1 << 30)
    with pytest.raises(ValueError, match="bytes, too many for a meta.pkl"):
        TokenFolder(folder)


def test_folder_without_meta_opens_once_the_dtype_is_given(tmp_path):
    folder = write(tmp_path / "d", train=[50256, 11, 13])
    with pytest.raises(ValueError, match="Pass dtype='uint16'"):
        TokenFolder(folder)
    data = TokenFolder(folder, dtype="uint16")
    assert data.vocab_size == 50257
    assert TokenFolder(folder, dtype="uint16", vocab_size=50304).vocab_size == 50304
    assert not data.has_tokenizer
    with pytest.raises(ValueError, match="has no tokenizer"):
        _ = data.tokenizer


META = {"dtype": "uint16", "vocab_size": 30, "tokenizer": "char", "train_tokens": 30, "val_tokens": 20}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.bin").write_bytes(b"123"), "has 3 bytes, which are no whole number of uint16"),
        (lambda d: (d / "train.bin").write_bytes(b""), "has 0 bytes"),
        (lambda d: (d / "meta.json").write_text("[1]"), "meta.json is no mapping with a whole vocab_size"),
        (lambda d: (d / "meta.json").write_text(f'{{"vocab_size": {1 << 40}}}'), "more than files of 32-bit ids"),
        (lambda d: (d / "train.bin").write_bytes(b"12"), "has 1 tokens, and meta.json says 30"),
        (lambda d: (d / "val.bin").unlink(), "has no val.bin"),
        (lambda d: (d / "val.bin").write_bytes(bytes([30, 0] * 20)), "val.bin .* has id 30, and the vocabulary ends"),
    ],
)
def test_broken_files_are_told(damage, message, tmp_path):
    folder = write(tmp_path / "d", meta=META)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        TokenFolder(folder).check_ids()


def test_what_contradicts_the_folder_is_refused(tmp_path):
    folder = write(tmp_path / "d", meta=META)
    assert TokenFolder(folder, dtype="uint16", vocab_size=30).vocab_size == 30
    with pytest.raises(ValueError, match="dtype='uint8', but"):
        TokenFolder(folder, dtype="uint8")
    with pytest.raises(ValueError, match="vocab_size=31, but"):
        TokenFolder(folder, vocab_size=31)
    with pytest.raises(ValueError, match="val.bin in .* needs 21 tokens, and there are 20"):
        TokenFolder(folder).blocks("val", 20)
    with pytest.raises(ValueError, match="split='test' is unknown"):
        TokenFolder(folder).tokens("test")
    with pytest.raises(ValueError, match="is no folder here or in data/"):
        TokenFolder(tmp_path / "missing")


def test_names_stand_for_folders_in_data(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "mine", meta=META)
    monkeypatch.chdir(tmp_path)
    assert TokenFolder("mine").vocab_size == 30


def test_ready_set_is_made_once_by_processes_that_ask_at_the_same_time(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = pool.map(shakespeare_char, [tmp_path] * 6)
    assert len(set(folders)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [folders[0].name]
    data = TokenFolder(folders[0])
    assert len(data.tokens("train")) > 1_000_000
    assert data.tokenizer.decode(data.tokens("train")[:26]) == "THE TRAGEDY OF CORIOLANUS\n"
    data.check_ids()
