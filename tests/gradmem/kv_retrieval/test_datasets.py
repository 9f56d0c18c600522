"""Datasets in memory, on disk and as streams have the same rows, and appear on disk whole or not at all."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
from torch.utils.data import DataLoader

from hf_gradtools.gradmem.kv_retrieval import (
    KVRetrievalConfig,
    dataset,
    generate,
    generate_kv_dataset,
    stream_kv_dataset,
)
from hf_gradtools.gradmem.kv_retrieval import save_kv_datasets as save
from tests.gradmem.kv_retrieval.reading import check_row


NAME = "N2-K2V2-S2(4-9)-V16"


@pytest.fixture(scope="module")
def rows():
    return generate_kv_dataset(NAME, 2500)


def test_rows_do_not_depend_on_processes_on_the_file_or_on_how_many_there_are(rows, tmp_path):
    many = generate_kv_dataset(NAME, 2500, num_proc=4, cache_file=tmp_path / "rows.arrow")
    assert many[:] == rows[:]
    assert many.features == rows.features
    assert many.cache_files
    assert not rows.cache_files
    for fewer in (1, 999, 1000, 1001):
        assert generate_kv_dataset(f"{NAME}_{fewer}")[:] == rows[:fewer]
    check_row(rows[2499], KVRetrievalConfig.from_name(NAME))


def test_another_seed_or_split_has_other_rows(rows):
    first = rows[:3]["context"]
    assert generate_kv_dataset(NAME, 3, seed=2**32)[:]["context"] != first
    assert generate_kv_dataset(NAME, 3, split="valid")[:]["context"] != first


def test_a_cache_file_of_other_rows_is_written_anew(tmp_path):
    first, second = (generate_kv_dataset(NAME, 5, seed, cache_file=tmp_path / "rows.arrow") for seed in (0, 1))
    assert second[:] == generate_kv_dataset(NAME, 5, seed=1)[:]
    assert first[:] == generate_kv_dataset(NAME, 5)[:]


def test_a_stream_has_the_same_rows(rows):
    stream = stream_kv_dataset(NAME, 2500)
    assert list(stream) == rows.to_list()
    assert list(stream) == rows.to_list()  # again from the first
    assert stream.features == rows.features


def test_workers_share_a_stream(rows):
    loader = DataLoader(stream_kv_dataset(NAME, 2500), batch_size=None, num_workers=2)
    assert sorted(map(str, loader)) == sorted(map(str, rows.to_list()))


def test_what_is_saved_is_what_is_generated_and_nothing_else_is_left(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved = save(NAME, tmp_path / "new" / "kv", 2500, valid_rows=20, num_proc=2)
    assert saved["train"][:] == rows[:]
    assert saved["valid"][:] == generate_kv_dataset(NAME, 20, split="valid")[:]
    assert all(str(tmp_path / "new" / "kv") in file["filename"] for file in saved["train"].cache_files)
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["kv"]


@pytest.mark.parametrize("step", ["block_table", "build_kv_tokenizer"])
def test_a_killed_process_leaves_nothing_at_its_folder_and_the_next_names_what_is_left(step, tmp_path, monkeypatch):
    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    out, told = tmp_path / "kv[1]", []
    with monkeypatch.context() as patch:
        patch.setattr(dataset, step, killed)
        process = multiprocessing.get_context("fork").Process(target=save, args=(NAME, out, 1100, 10))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".kv[1].")
    monkeypatch.setattr(dataset.logger, "warning", told.append)
    assert len(save(NAME, out, 1100, 10)["train"]) == 1100
    assert sorted(os.listdir(tmp_path)) == [left, "kv[1]"]
    assert left in told[0]


def is_running(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.timeout(60)
def test_workers_of_a_killed_process_end_too(tmp_path, monkeypatch):
    def slow(*arguments):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.1)
        return generate.block_table(*arguments)

    monkeypatch.setattr(dataset, "block_table", slow)
    process = multiprocessing.get_context("fork").Process(target=generate_kv_dataset, args=(NAME, 100_000, 0, 2))
    process.start()
    while len(os.listdir(tmp_path)) < 2:
        time.sleep(0.02)
    others = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = os.listdir(tmp_path)
    assert set(workers) < set(others)
    process.kill()
    process.join()
    try:
        while any(is_running(worker) for worker in workers):
            time.sleep(0.02)
    finally:
        for other in set(others) - set(workers):  # what `datasets` passes results through stays
            os.kill(int(other), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_workers_leave_an_interrupt_to_their_parent(tmp_path, monkeypatch):
    """Ctrl-C in a terminal reaches all of them: each would say so in a traceback of its own."""
    said, places = tmp_path / "said", tmp_path / "places"

    def slow(*arguments):
        (places / str(os.getpid())).touch()
        time.sleep(0.1)
        return generate.block_table(*arguments)

    def interrupted():
        os.setsid()
        with open(said, "w", buffering=1) as sys.stderr:
            try:
                generate_kv_dataset(NAME, 100_000, num_proc=2)
            except KeyboardInterrupt:
                os._exit(9)

    places.mkdir()
    monkeypatch.setattr(dataset, "block_table", slow)
    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    while len(os.listdir(places)) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 9
    assert "Traceback" not in said.read_text()


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    def broken(vocab_size):
        raise OSError("the disk is full")

    monkeypatch.setattr(dataset, "build_kv_tokenizer", broken)
    with pytest.raises(OSError, match="full"):
        save(NAME, tmp_path / "kv", 10, 10)
    assert not os.listdir(tmp_path)


def test_what_cannot_be_saved_is_told_before_anything_is_written(tmp_path):
    out = tmp_path / "new" / "kv"
    for arguments, message in (
        ({"num_rows": None}, "num_rows is missing"),
        ({"num_rows": 0}, "num_rows=0 must be at least 1"),
        ({"valid_rows": 0}, "valid_rows=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"num_proc": 0}, "num_proc=0 must be at least 1"),
        ({"config": "N9"}, "is no name of a task"),
    ):
        with pytest.raises(ValueError, match=message):
            save(**{"config": NAME, "out": out, "num_rows": 5, **arguments})
    assert not os.listdir(tmp_path)
    with pytest.raises(FileExistsError, match="is there already"):
        save(NAME, tmp_path, 5)


@pytest.mark.parametrize("make", [generate_kv_dataset, stream_kv_dataset])
def test_rows_that_cannot_be_are_told_at_once(make):
    with pytest.raises(ValueError, match=r"split='test' is unknown. Pass one of train, valid"):
        make(NAME, 5, split="test")
    with pytest.raises(ValueError, match="seed=-1"):
        make(NAME, 5, seed=-1)
    with pytest.raises(ValueError, match="num_rows is missing"):
        make(NAME)
