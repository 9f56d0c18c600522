"""Every damaged byte of a store is found and named with the rows it belongs to."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.core import checksums, store
from hf_gradtools.core.checksums import StoreCorruptError, verify
from hf_gradtools.core.store import RowStore, read_manifest, read_table


IDENTITY = {"model": "gpt2", "seed": 0}
WRITER = """
import itertools, sys
from hf_gradtools.core.store import RowStore
writer = RowStore(sys.argv[1], {"model": "gpt2", "seed": 0}, rows_per_shard=20)
for row in itertools.count(writer.num_rows):
    writer.append({"row": [row]})
    print(row, flush=True)
"""
SMALL = 512  # bytes of a block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", SMALL)
    monkeypatch.setattr(store, "ROWS_PER_SEALED_BATCH", 10)


def numbered(*rows):
    return {"row": list(rows)}


def rows_in(path):
    return read_table(path)["row"].to_pylist()


def leave_open(path, *appends):
    """A store as a killed process leaves it: appended to, not sealed."""
    writer = RowStore(path, IDENTITY)
    for rows in appends:
        writer.append(numbered(*rows))
    writer.close()


def write(path, shards=2, ranks=1, finish=True):
    for rank in reversed(range(ranks)):
        with RowStore(path, IDENTITY, rank=rank, rows_per_shard=40) as writer:
            writer.append({"row": np.arange(40 * shards), "half": np.ones((40 * shards, 8), np.float16)})
            if finish:
                writer.finish()
    return path


def split(path, shards=2):
    """Several shards of 40 rows."""
    with RowStore(path, IDENTITY, rows_per_shard=40) as writer:
        for shard in range(shards):
            writer.append({"row": np.arange(40) + 40 * shard, "half": np.ones((40, 8), np.float16)})
        writer.finish()
    return path


def flip(file, position, mask=0x10):
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def damages(path):
    with pytest.raises(StoreCorruptError) as error:
        verify(path)
    return error.value.damages


def test_an_undamaged_store_verifies_and_counts_what_was_read(tmp_path):
    split(tmp_path)
    seen = []
    report = verify(tmp_path, seen.append)
    shards = sum(file.stat().st_size for file in tmp_path.glob("*.arrow"))
    assert (report.files, report.rows, report.without_checksums) == (5, 80, [])
    assert sum(seen) == shards == report.bytes - (tmp_path / "manifest.json").stat().st_size


def test_a_flipped_byte_anywhere_in_any_file_is_found_and_its_file_named(tmp_path):
    split(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for position in [*range(0, len(whole), 37), len(whole) - 1]:
            flip(file, position, 1 << position % 8)
            found = damages(tmp_path)
            assert [damage.file for damage in found] == [file.name], position
            assert found[0].bytes[0] <= position < found[0].bytes[1]
            file.write_bytes(whole)
    verify(tmp_path)


def test_the_rows_of_a_damaged_block_are_those_that_it_holds(tmp_path):
    split(tmp_path)
    shard = tmp_path / "shard-00000-00001.arrow"
    position = shard.read_bytes().index(np.arange(60, 70).tobytes())  # in the third batch of ten rows
    flip(shard, position)
    (damage,) = damages(tmp_path)
    assert damage.rows[0] <= 60 < damage.rows[1]
    assert damage.rows[1] - damage.rows[0] <= 40
    assert damage.bytes == (position // SMALL * SMALL, position // SMALL * SMALL + SMALL)
    with pytest.raises(StoreCorruptError, match=rf"{shard.name}: is not what was written \(bytes .*, rows .*Restore"):
        verify(tmp_path)


def test_each_damage_is_listed(tmp_path):
    split(tmp_path, shards=3)
    flip(tmp_path / "shard-00000-00000.arrow", 100)
    flip(tmp_path / "shard-00000-00002.arrow", 200)
    flip(tmp_path / "shard-00000-00002.arrow", 1300)
    assert [damage.file[12:17] for damage in damages(tmp_path)] == ["00000", "00002", "00002"]


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_cut_shard_is_found_with_the_rows_it_lost(tmp_path_factory, fraction):
    path = split(tmp_path_factory.mktemp("store"))
    shard = path / "shard-00000-00000.arrow"
    size = shard.stat().st_size
    cut = int(fraction * size)
    shard.write_bytes(shard.read_bytes()[:cut])
    (damage,) = damages(path)
    assert (damage.file, damage.what, damage.bytes) == (shard.name, "is cut", (cut, size))
    assert damage.rows is None or 0 <= damage.rows[0] < damage.rows[1] == 40


def test_bytes_after_the_end_of_a_shard_are_found(tmp_path):
    split(tmp_path)
    with open(tmp_path / "shard-00000-00000.arrow", "ab") as shard:
        shard.write(b"more")
    (damage,) = damages(tmp_path)
    assert damage.what == "has bytes after its end"


@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_shard_is_missed_and_later_rows_keep_their_numbers(tmp_path, finished):
    split(tmp_path, shards=3)
    if not finished:
        leave_open(tmp_path)
    (tmp_path / "shard-00000-00001.arrow").unlink()
    flip(tmp_path / "shard-00000-00002.arrow", 300)
    lost, flipped = damages(tmp_path)
    assert (lost.what, lost.rows) == ("is missing", (40, 80))
    assert flipped.rows[0] == 80


@pytest.mark.parametrize("suffixes", [["sha256"], ["arrow", "sha256"]])
def test_a_lost_sidecar_of_a_complete_store_is_missed(tmp_path, suffixes):
    split(tmp_path, shards=3)
    for suffix in suffixes:
        (tmp_path / f"shard-00000-00001.{suffix}").unlink()
    (damage,) = damages(tmp_path)
    assert (damage.file, damage.what) == (f"shard-00000-00001.{suffixes[0]}", "is missing")
    assert damage.rows == (40, 80)


def test_rows_in_progress_have_no_checksums_and_are_named(tmp_path):
    leave_open(tmp_path, [0, 1], [2])
    report = verify(tmp_path)
    assert (report.rows, report.without_checksums) == (3, ["shard-00000-00000.inprogress"])


def as_older_version(path):
    """The same store as it was written before there were checksums."""
    for sidecar in path.glob("*.sha256"):
        sidecar.unlink()
    keys = ("schema_version", "complete", "identity", "extra")
    old = {key: json.loads((path / "manifest.json").read_bytes())[key] for key in keys}
    (path / "manifest.json").write_text(json.dumps(old, indent=2) + "\n")


def test_a_store_of_an_older_version_opens_goes_on_and_verifies_as_without_checksums(tmp_path):
    as_older_version(split(tmp_path))
    shards = ["shard-00000-00000.arrow", "shard-00000-00001.arrow"]
    assert read_table(tmp_path).num_rows == 80
    assert verify(tmp_path).without_checksums == ["manifest.json", *shards]
    with RowStore(tmp_path, IDENTITY) as writer:
        writer.append({"row": np.arange(3), "half": np.ones((3, 8), np.float16)})
        writer.finish()
    assert verify(tmp_path).without_checksums == shards
    flip(tmp_path / "shard-00000-00002.arrow", 500)
    flip(tmp_path / "manifest.json", 5)
    assert {damage.file for damage in damages(tmp_path)} == {"manifest.json", "shard-00000-00002.arrow"}


@pytest.mark.parametrize("maximum", [50, 30, -1])
@pytest.mark.parametrize("nth", range(5))
def test_truncating_a_store_of_an_older_version_can_be_killed(tmp_path, monkeypatch, maximum, nth):
    as_older_version(split(tmp_path))
    writer, real, calls = RowStore(tmp_path, IDENTITY), os.replace, itertools.count()

    def killed(*args):
        if next(calls) == nth:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        writer.truncate("row", maximum)
    assert verify(tmp_path).rows in (maximum + 1, 40, 80)
    RowStore(tmp_path, IDENTITY).truncate("row", maximum)
    assert verify(tmp_path).rows == maximum + 1


def test_a_cut_shard_of_an_older_version_is_found(tmp_path):
    as_older_version(split(tmp_path))
    shard = tmp_path / "shard-00000-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-300])
    (damage,) = damages(tmp_path)
    assert (damage.file, damage.what) == (shard.name, "is cut or unreadable")


def test_a_folder_without_a_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no row store"):
        verify(tmp_path)


def test_ranks_verify_in_the_order_of_their_rows(tmp_path):
    write(tmp_path, shards=1, ranks=2)
    flip(tmp_path / "shard-00001-00000.arrow", 700)
    (damage,) = damages(tmp_path)
    assert damage.rows[0] >= 40
    assert list(read_manifest(tmp_path)["shards"]) == ["shard-00000-00000.arrow", "shard-00001-00000.arrow"]


def test_a_truncated_and_continued_store_verifies(tmp_path):
    split(tmp_path, shards=3)
    with RowStore(tmp_path, IDENTITY) as writer:
        writer.truncate("row", 50)
        verify(tmp_path)
        writer.append({"row": [51], "half": np.ones((1, 8), np.float16)})
        writer.finish()
    assert verify(tmp_path).rows == 52
    assert rows_in(tmp_path) == list(range(52))


def test_sigkill_at_any_moment_leaves_a_store_that_verifies(tmp_path):
    chance = random.Random(1)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
        report = verify(tmp_path)
        assert report.rows == len(rows_in(tmp_path))
        assert all(name.endswith(".inprogress") for name in report.without_checksums)


def test_appending_to_a_killed_seal_replaces_its_sidecar(tmp_path):
    leave_open(tmp_path, [0, 1])
    checksums.write_sidecar(tmp_path / "shard-00000-00000.arrow", [{"bytes": 1, "rows": 1}])  # killed before replace
    assert verify(tmp_path).rows == 2
    with RowStore(tmp_path, IDENTITY) as writer:
        writer.append(numbered(2))
        writer.finish()
    assert verify(tmp_path).rows == 3
