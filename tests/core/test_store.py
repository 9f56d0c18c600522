import contextlib
import errno
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.core import shards, store
from hf_gradtools.core.checksums import HashingFile, verify
from hf_gradtools.core.store import (
    RowStore,
    StoreMismatchError,
    atomic_write,
    read_dataset,
    read_manifest,
    read_table,
    write_json_atomically,
)


IDENTITY = {"model": "gpt2", "seed": 0}


def numbered(*rows):
    return {"row": list(rows)}


def rows_in(path):
    table = read_table(path)
    return table["row"].to_pylist() if table.num_rows else []


def names_in(path):
    """The files of a store but the checksums, of which each sealed shard has one."""
    names = sorted(file.name for file in path.iterdir())
    sealed = [name.replace(".arrow", ".sha256") for name in names if name.endswith(".arrow")]
    assert [name for name in names if name.endswith(".sha256")] == sealed
    return [name for name in names if not name.endswith(".sha256")]


def interrupt(*_):
    raise KeyboardInterrupt


def leave_open(path, *appends, **options):
    """A store as a killed process leaves it: appended to, not sealed."""
    writer = RowStore(path, IDENTITY, **options)
    for rows in appends:
        writer.append(numbered(*rows))
    writer.close()
    return writer


def test_rows_come_back_as_they_went_in(tmp_path):
    projections = np.arange(12, dtype=np.float16).reshape(3, 4)
    with RowStore(tmp_path, IDENTITY) as writer:
        writer.append({"sample_id": np.arange(3), "projection": projections, "tags": [["a"], [], None]})
        writer.finish()
    assert names_in(tmp_path) == ["manifest.json", "shard-00000-00000.arrow"]
    dataset = read_dataset(tmp_path)
    assert dataset["sample_id"][:] == [0, 1, 2]
    assert dataset["tags"][:] == [["a"], [], None]
    assert np.array_equal(dataset.with_format("numpy")["projection"][:], projections)
    assert dataset.data.schema.field("projection").type == pa.list_(pa.float16(), 4)


def test_sealed_shards_are_memory_mapped(tmp_path):
    with RowStore(tmp_path, IDENTITY, rows_per_shard=2) as writer:
        writer.append({"row": np.zeros((2, 50_000))})
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    table = read_table(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pa.total_allocated_bytes() == allocated
    assert peak < table.nbytes / 8
    assert read_dataset(tmp_path).cache_files == [{"filename": str(tmp_path / "shard-00000-00000.arrow")}]


def test_every_appended_row_is_readable_at_once(tmp_path):
    with RowStore(tmp_path, IDENTITY, rows_per_shard=3) as writer:
        assert rows_in(tmp_path) == []
        for row in range(8):
            writer.append(numbered(row))
            assert rows_in(tmp_path) == list(range(row + 1))
            assert read_dataset(tmp_path)["row"][:] == list(range(row + 1))


@pytest.mark.parametrize("read", [read_table, read_dataset])
def test_store_without_rows_reads_as_empty(tmp_path, read):
    writer = RowStore(tmp_path, IDENTITY)
    writer.append(numbered())
    writer.finish()
    assert read(tmp_path).num_rows == 0
    assert names_in(tmp_path) == ["manifest.json"]


def test_torn_tail_of_any_length_is_dropped_and_appended_over(tmp_path):
    leave_open(tmp_path, [0, 1], [2])
    shard = tmp_path / "shard-00000-00000.inprogress"
    whole = shard.stat().st_size
    leave_open(tmp_path / "longer", [0, 1], [2], [3, 4])
    stream = (tmp_path / "longer" / shard.name).read_bytes()
    for cut in range(whole, len(stream)):
        shard.write_bytes(stream[:cut])
        assert rows_in(tmp_path) == [0, 1, 2]
        with RowStore(tmp_path, IDENTITY) as writer:
            assert writer.num_rows == 3
            writer.append(numbered(3))
            assert rows_in(tmp_path) == [0, 1, 2, 3]
        for remains in tmp_path.glob("shard-*"):
            remains.unlink()


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), fraction=st.floats(0, 1))
def test_cut_anywhere_keeps_exactly_the_whole_batches(tmp_path_factory, sizes, fraction):
    path = tmp_path_factory.mktemp("store")
    shard = path / "shard-00000-00000.inprogress"
    writer = RowStore(path, IDENTITY)
    count, ends = itertools.count(), []
    for size in sizes:
        writer.append(numbered(*itertools.islice(count, size)))
        ends.append(shard.stat().st_size)
    writer.close()
    cut = round(fraction * ends[-1])
    os.truncate(shard, cut)
    kept = sum(size for size, end in zip(sizes, ends, strict=True) if end <= cut)
    assert rows_in(path) == list(range(kept))
    with RowStore(path, IDENTITY) as resumed:
        assert resumed.num_rows == kept
        resumed.append(numbered(kept))
    assert rows_in(path) == list(range(kept + 1))


def test_zeros_at_the_tail_are_dropped(tmp_path):
    leave_open(tmp_path, [0], [1])
    with open(tmp_path / "shard-00000-00000.inprogress", "ab") as shard:
        shard.write(bytes(4096))
    assert rows_in(tmp_path) == [0, 1]
    leave_open(tmp_path, [2])
    assert rows_in(tmp_path) == [0, 1, 2]


def test_failed_append_leaves_no_piece_in_the_way(tmp_path):
    class FullDisk(io.FileIO):
        def write(self, data):
            super().write(data[:100])
            raise OSError("No space left on device")

    writer = leave_open(tmp_path, [0])
    writer._file = FullDisk(tmp_path / "shard-00000-00000.inprogress", "ab")
    with pytest.raises(OSError, match="No space"):
        writer.append(numbered(1))
    writer.close()
    writer.append(numbered(2))
    writer.close()
    assert rows_in(tmp_path) == [0, 2]
    assert writer.num_rows == 2


@pytest.mark.parametrize("nth", range(4))
def test_full_disk_while_sealing_leaves_a_readable_store_that_goes_on(tmp_path, monkeypatch, nth):
    writer, calls = RowStore(tmp_path, IDENTITY, rows_per_shard=4), itertools.count()

    def full(file, data):
        if next(calls) == nth:
            file._file.write(memoryview(data).cast("B")[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    real = HashingFile.write
    monkeypatch.setattr(HashingFile, "write", full)
    writer.append(numbered(0, 1))
    with pytest.raises(OSError, match="No space"):
        writer.append(numbered(2, 3))
    before = rows_in(tmp_path)
    assert before == list(range(writer.num_rows))
    assert not list(tmp_path.glob("*.tmp"))
    with RowStore(tmp_path, IDENTITY) as resumed:
        assert resumed.num_rows == len(before)
        resumed.append(numbered(len(before)))
        resumed.finish()
    assert rows_in(tmp_path) == list(range(len(before) + 1))
    verify(tmp_path)


LIMITED = textwrap.dedent(
    """
    import resource, sys
    from hf_gradtools.core.store import RowStore
    writer = RowStore(sys.argv[1], {"model": "gpt2", "seed": 0})
    try:
        for row in range(0, 200, 10):
            if row == int(sys.argv[2]):
                resource.setrlimit(resource.RLIMIT_FSIZE, (2_500, 2_500))
            writer.append({"row": list(range(row, row + 10)), "text": ["x" * 50] * 10})
            if row == 90:
                writer.seal()
    except OSError:
        print(writer.num_rows)
    """
)


@pytest.mark.parametrize("first_limited", [0, 90, 100])  # while appending, appending to more, and sealing
def test_file_too_large_for_the_disk_leaves_a_readable_store_that_goes_on(tmp_path, first_limited):
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(first_limited)]
    written = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert written > 0
    assert rows_in(tmp_path) == list(range(written))
    with RowStore(tmp_path, IDENTITY) as resumed:
        resumed.append({"row": [written], "text": ["y"]})
        resumed.finish()
    assert rows_in(tmp_path) == list(range(written + 1))
    verify(tmp_path)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), rows=st.integers(1, 5), size=st.integers(1, 100))
def test_sealed_batches_hold_the_same_rows_within_their_bounds(tmp_path_factory, sizes, rows, size):
    path = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "ROWS_PER_SEALED_BATCH", rows)
        patch.setattr(store, "BYTES_PER_SEALED_BATCH", size)
        count = itertools.count()
        leave_open(path, *[list(itertools.islice(count, n)) for n in sizes]).seal()
    assert rows_in(path) == list(range(sum(sizes)))
    lengths = [len(chunk) for chunk in read_table(path)["row"].chunks]
    assert max(lengths) <= max(1, min(rows, size // 8))


def test_sealing_holds_no_more_than_a_few_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BYTES_PER_SEALED_BATCH", 2**20)
    writer = RowStore(tmp_path, IDENTITY)
    for _ in range(64):
        writer.append({"row": np.zeros((16, 2**13))})
    writer.close()
    pool, before = pa.default_memory_pool(), pa.total_allocated_bytes()
    peaks = []
    real = HashingFile.write
    monkeypatch.setattr(HashingFile, "write", lambda *args: (peaks.append(pool.bytes_allocated()), real(*args))[1])
    writer.seal()
    assert max(peaks) - before < 8 * 2**20 < (tmp_path / "shard-00000-00000.arrow").stat().st_size / 7


def test_append_goes_on_where_the_kernel_took_only_a_part(tmp_path):
    class SlowDisk(io.FileIO):
        def write(self, data):
            return super().write(data[:100])

    writer = leave_open(tmp_path, [0])
    writer._file = SlowDisk(tmp_path / "shard-00000-00000.inprogress", "ab")
    writer.append(numbered(1, 2))
    writer.append(numbered(3))
    writer.close()
    assert rows_in(tmp_path) == [0, 1, 2, 3]


def test_kill_between_replace_and_unlink_doubles_nothing(tmp_path):
    leave_open(tmp_path, [0], [1])
    shard = tmp_path / "shard-00000-00000.inprogress"
    stale = shard.read_bytes()
    RowStore(tmp_path, IDENTITY).seal()
    shard.write_bytes(stale[:-1])  # after a power failure it may be shorter, too
    assert rows_in(tmp_path) == [0, 1]
    with RowStore(tmp_path, IDENTITY) as writer:
        assert not shard.exists()
        writer.append(numbered(2))
    assert rows_in(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("moment", ["fsync", "replace", "unlink", "open"])
def test_appends_after_an_interrupted_seal_hide_nothing(tmp_path, monkeypatch, moment):
    writer = leave_open(tmp_path, [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.seal()
    for row in (2, 3):
        writer.append(numbered(row))
        assert rows_in(tmp_path) == list(range(row + 1))
    writer.finish()
    assert rows_in(tmp_path) == [0, 1, 2, 3]
    assert [name[-11:] for name in names_in(tmp_path)[1:]] == ["00000.arrow", "00001.arrow"]


def test_opening_removes_tmp_files_of_its_own_rank_only(tmp_path):
    leave_open(tmp_path, [0])
    for rank in (0, 1):
        (tmp_path / f"shard-{rank:05d}-00007.arrow.{rank:05d}.tmp").write_bytes(b"half a sh")
    assert rows_in(tmp_path) == [0]
    RowStore(tmp_path, IDENTITY)
    assert names_in(tmp_path) == [
        "manifest.json",
        "shard-00000-00000.inprogress",
        "shard-00001-00007.arrow.00001.tmp",
    ]


def test_close_keeps_the_file_growing_afterwards(tmp_path):
    writer = leave_open(tmp_path, [0])
    writer.append(numbered(1))
    writer.finish()
    assert rows_in(tmp_path) == [0, 1]


def test_full_shards_are_sealed_into_few_batches(tmp_path):
    with RowStore(tmp_path, IDENTITY, rows_per_shard=4) as writer:
        for row in range(0, 10, 2):
            writer.append(numbered(row, row + 1))
    suffixes = [name.partition("-00000-")[2] for name in names_in(tmp_path)[1:]]
    assert suffixes == ["00000.arrow", "00001.arrow", "00002.inprogress"]
    assert [len(chunk) for chunk in read_table(tmp_path)["row"].chunks] == [4, 4, 2]
    assert rows_in(tmp_path) == list(range(10))


def test_sealing_splits_rows_into_bounded_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS_PER_SEALED_BATCH", 4)
    leave_open(tmp_path, range(3), range(3, 10)).seal()
    assert [len(chunk) for chunk in read_table(tmp_path)["row"].chunks] == [4, 4, 2]
    assert rows_in(tmp_path) == list(range(10))


def test_truncate_drops_later_rows_sealed_or_not_and_again_nothing(tmp_path):
    with RowStore(tmp_path, IDENTITY, rows_per_shard=4) as writer:
        for step in range(6):
            writer.append({"row": [2 * step, 2 * step + 1], "step": [step, step], "half": np.ones((2, 3), np.float16)})
    resumed = RowStore(tmp_path, IDENTITY, rows_per_shard=4)
    assert resumed.truncate("step", 5) == 0
    assert resumed.truncate("step", 2) == 6
    assert resumed.truncate("step", 2) == 0
    assert resumed.num_rows == RowStore(tmp_path, IDENTITY).num_rows == 6
    assert rows_in(tmp_path) == list(range(6))
    resumed.append({"row": [6, 7], "step": [3, 3], "half": np.ones((2, 3), np.float16)})
    resumed.close()
    assert rows_in(tmp_path) == list(range(8))


def test_truncate_of_everything_leaves_an_empty_store(tmp_path):
    leave_open(tmp_path, [0, 1], [2])
    writer = RowStore(tmp_path, IDENTITY)
    assert writer.truncate("row", -1) == 3
    assert rows_in(tmp_path) == []
    assert writer.truncate("row", -1) == 0
    writer.append(numbered(7))
    writer.close()
    assert rows_in(tmp_path) == [7]


@pytest.mark.parametrize(("moment", "nth"), [("replace", n) for n in range(4)] + [("unlink", n) for n in range(8)])
def test_truncate_killed_in_between_leaves_a_prefix_and_can_be_repeated(tmp_path, monkeypatch, moment, nth):
    with RowStore(tmp_path, IDENTITY, rows_per_shard=3) as writer:
        for row in range(9):
            writer.append(numbered(row))
    resumed, real, calls = RowStore(tmp_path, IDENTITY), getattr(os, moment), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(os, moment, lambda *args, **kwargs: interrupt() if next(calls) == nth else real(*args, **kwargs))
        with contextlib.suppress(KeyboardInterrupt):
            resumed.truncate("row", 1)
    assert rows_in(tmp_path) in ([0, 1], list(range(3)), list(range(6)), list(range(9)))
    assert verify(tmp_path).without_checksums == []
    RowStore(tmp_path, IDENTITY).truncate("row", 1)
    assert rows_in(tmp_path) == [0, 1]
    verify(tmp_path)


def test_truncate_keeps_null_and_names_a_missing_column(tmp_path):
    writer = leave_open(tmp_path, [0, None, 5])
    assert writer.truncate("row", 1) == 1
    assert rows_in(tmp_path) == [0, None]
    with pytest.raises(ValueError, match=r"column='step'.*\['row'\]"):
        writer.truncate("step", 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 1}, "seed: stored 0, given 1"), ({"layers": "all"}, "layers: stored '<absent>', given 'all'")],
)
def test_other_identity_is_refused_by_name(tmp_path, changes, named):
    leave_open(tmp_path, [0])
    before = names_in(tmp_path)
    with pytest.raises(StoreMismatchError, match=named) as error:
        RowStore(tmp_path, {**IDENTITY, **changes})
    assert "model" not in str(error.value).replace(str(tmp_path), "")
    assert names_in(tmp_path) == before


def test_identity_is_compared_as_json(tmp_path):
    RowStore(tmp_path, {"rank": (16, 16), "widths": {1: 2}})
    RowStore(tmp_path, {"widths": {"1": 2}, "rank": [16, 16]}, extra={"version": "2"})
    with pytest.raises(ValueError, match=r"dtype\('float16'\).*must hold JSON"):
        RowStore(tmp_path / "other", {"dtype": np.dtype("float16")})


@pytest.mark.parametrize("resume", [False, True])
def test_other_columns_are_refused_by_name(tmp_path, resume):
    with RowStore(tmp_path, IDENTITY) as first:
        first.append({"row": [0], "loss": [0.5]})
    with RowStore(tmp_path, IDENTITY) if resume else first as writer:
        with pytest.raises(ValueError, match="loss: stored 'double', given 'int64'; step: stored '<absent>'") as error:
            writer.append({"row": [1], "loss": [1], "step": [1]})
        assert "row:" not in str(error.value)
        writer.append(pa.table({"loss": [1.5], "row": [1]}))
    assert read_table(tmp_path).to_pydict() == {"row": [0, 1], "loss": [0.5, 1.5]}


def test_dictionary_columns_are_refused_at_any_depth(tmp_path):
    column = pa.nulls(1, pa.list_(pa.dictionary(pa.int32(), pa.string())))
    with pytest.raises(ValueError, match=r"\['row'\] are dictionary-encoded"):
        RowStore(tmp_path, IDENTITY).append({"row": column})


def test_column_of_three_dimensions_is_refused_with_its_shape(tmp_path):
    with pytest.raises(ValueError, match=r"columns\['row'\] has shape \(2, 3, 4\)"):
        RowStore(tmp_path, IDENTITY).append({"row": np.zeros((2, 3, 4))})


def test_ranks_merge_in_order_and_touch_only_their_own(tmp_path):
    writers = [RowStore(tmp_path, IDENTITY, rank=rank, rows_per_shard=2) for rank in (1, 0)]
    for row in range(3):
        for writer in writers:
            writer.append(numbered(10 * writer.rank + row))
            writer.close()
    assert rows_in(tmp_path) == [0, 1, 2, 10, 11, 12]
    assert RowStore(tmp_path, IDENTITY, rank=1).truncate("row", 10) == 2
    assert rows_in(tmp_path) == read_dataset(tmp_path)["row"][:] == [0, 1, 2, 10]
    assert (tmp_path / "shard-00000-00001.inprogress").exists()


def test_shard_torn_before_its_first_batch_hides_no_other(tmp_path):
    leave_open(tmp_path, [0])
    leave_open(tmp_path, [10], rank=1)
    os.truncate(tmp_path / "shard-00001-00000.inprogress", 10)
    assert rows_in(tmp_path) == read_dataset(tmp_path)["row"][:] == [0]


def test_shards_are_in_order_of_number_beyond_five_digits(tmp_path):
    leave_open(tmp_path, [0]).finish()
    for suffix in ("arrow", "sha256"):
        (tmp_path / f"shard-00000-00000.{suffix}").rename(tmp_path / f"shard-00000-99999.{suffix}")
    leave_open(tmp_path, [1])
    assert names_in(tmp_path)[1:] == ["shard-00000-100000.inprogress", "shard-00000-99999.arrow"]
    assert rows_in(tmp_path) == [0, 1]


def test_complete_lasts_from_finish_of_rank_0_to_the_next_change(tmp_path):
    leave_open(tmp_path, [1], rank=1).finish()
    assert not read_manifest(tmp_path)["complete"]
    leave_open(tmp_path, [0]).finish()
    reopened = RowStore(tmp_path, IDENTITY)
    reopened.append(numbered())
    assert reopened.truncate("row", 9) == 0
    assert reopened.complete
    assert read_manifest(tmp_path)["complete"]
    assert reopened.truncate("row", -1) == 1
    assert not read_manifest(tmp_path)["complete"]
    reopened.finish()
    reopened.append(numbered(2))
    reopened.close()
    assert not read_manifest(tmp_path)["complete"]
    assert not RowStore(tmp_path, IDENTITY).complete


def test_manifest_keeps_what_it_was_made_with(tmp_path):
    RowStore(tmp_path, IDENTITY, extra={"version": "1"}).finish()
    leave_open(tmp_path, [0], extra={"version": "2"})
    expected = {"schema_version": 1, "complete": False, "identity": IDENTITY, "extra": {"version": "1"}}
    assert read_manifest(tmp_path) == expected


def test_manifest_of_a_complete_store_lists_its_shards(tmp_path):
    leave_open(tmp_path, [1, 2], rank=1).finish()
    leave_open(tmp_path, [0]).finish()
    assert read_manifest(tmp_path)["shards"] == {"shard-00000-00000.arrow": 1, "shard-00001-00000.arrow": 2}
    leave_open(tmp_path, [3])
    assert "shards" not in read_manifest(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"schema_version": 99}'])
def test_folder_without_a_store_is_refused_with_its_path(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    for read in (read_manifest, read_table, read_dataset):
        with pytest.raises(ValueError, match=tmp_path.name):
            read(tmp_path)


@pytest.mark.parametrize("options", [{"rank": -1}, {"rows_per_shard": 0}])
def test_impossible_numbers_are_refused_before_anything_is_made(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        RowStore(tmp_path / "store", IDENTITY, **options)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("read", [read_table, read_dataset])
def test_reader_follows_a_shard_that_is_sealed_under_its_hands(tmp_path, monkeypatch, read):
    leave_open(tmp_path, [0], [1])
    before = shards.list_shards(tmp_path)
    leave_open(tmp_path, [2]).finish()
    after = shards.list_shards(tmp_path)
    listings = iter([before, before, after, after])
    monkeypatch.setattr(shards, "list_shards", lambda _: next(listings))
    assert read(tmp_path).to_pandas()["row"].tolist() == [0, 1, 2]


def test_reader_distrusts_a_listing_that_missed_a_shard(tmp_path, monkeypatch):
    leave_open(tmp_path, [0])
    listings = iter([{}, *[shards.list_shards(tmp_path)] * 3])
    monkeypatch.setattr(shards, "list_shards", lambda _: next(listings))
    assert rows_in(tmp_path) == [0]


def test_reader_gives_up_on_a_shard_that_never_opens(tmp_path, monkeypatch):
    RowStore(tmp_path, IDENTITY)
    monkeypatch.setattr(shards, "list_shards", lambda path: {(0, 0): path / "shard-00000-00000.arrow"})
    with pytest.raises(RuntimeError, match="changed during each"):
        read_table(tmp_path)


def test_atomic_write_shows_the_old_file_until_the_new_is_whole(tmp_path):
    file = tmp_path / "value.json"
    write_json_atomically(file, {"a": 1})
    old = file.read_bytes()
    with atomic_write(file) as new:
        new.write(b"{}")
        new.flush()
        assert file.read_bytes() == old
    assert file.read_bytes() == b"{}"
    with pytest.raises(TypeError):
        write_json_atomically(file, {"a": object()})
    assert file.read_bytes() == b"{}"
    assert names_in(tmp_path) == ["value.json"]


WRITER = textwrap.dedent(
    """
    import sys
    from hf_gradtools.core.store import RowStore
    writer = RowStore(sys.argv[1], {"model": "gpt2", "seed": 0}, rows_per_shard=60)
    for row in range(writer.num_rows, 10**9):
        writer.append({"row": [row], "text": ["x" * (row % 500)]})
        sys.stdout.write(f"{row}\\n")
        sys.stdout.flush()
    """
)


def test_sigkill_at_any_moment_loses_no_row_and_doubles_none(tmp_path):
    chance, rows = random.Random(0), []
    for _ in range(10):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            first = int(writer.stdout.readline())
            assert first == len(rows)
            time.sleep(chance.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            returned = [first, *map(int, writer.stdout.read().split())]
        rows = rows_in(tmp_path)
        assert rows == list(range(len(rows)))
        assert len(rows) - 1 in (returned[-1], returned[-1] + 1)


def test_reader_beside_a_running_writer_sees_growing_prefixes(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()
        try:
            lengths = [0]
            while len(lengths) < 60:
                rows = rows_in(tmp_path)
                assert rows == list(range(len(rows)))
                assert len(rows) >= lengths[-1]
                lengths.append(len(rows))
        finally:
            writer.kill()
    assert lengths[-1] > lengths[1]


def test_a_store_without_rows_takes_a_new_identity(tmp_path):
    RowStore(tmp_path, {"layers": ["a"]}).close()
    with RowStore(tmp_path, {"layers": ["b"]}) as store:
        store.append({"x": [1]})
    assert read_manifest(tmp_path)["identity"] == {"layers": ["b"]}
    with pytest.raises(StoreMismatchError, match="layers"):
        RowStore(tmp_path, {"layers": ["a"]})


@pytest.mark.parametrize("torn_bytes", [0, 1, 40, 200])
def test_a_run_that_was_cut_ends_in_the_bytes_of_one_that_was_not(torn_bytes, tmp_path):
    batches = [{"step": [n] * 5, "value": np.full((5, 3), n, np.float32)} for n in range(6)]

    def write(store, part):
        for batch in part:
            store.append(batch)

    with RowStore(tmp_path / "whole", IDENTITY, rows_per_shard=20) as store:
        write(store, batches)
        store.finish()
    with RowStore(tmp_path / "cut", IDENTITY, rows_per_shard=20) as store:
        write(store, batches[:3])
    (shard,) = (tmp_path / "cut").glob("*.inprogress")
    if torn_bytes:
        shard.write_bytes(shard.read_bytes()[:-torn_bytes])
    with RowStore(tmp_path / "cut", IDENTITY, rows_per_shard=20) as store:
        assert store.num_rows == (10 if torn_bytes else 15)
        write(store, batches[store.num_rows // 5 :])
        store.finish()
    assert names_in(tmp_path / "cut") == names_in(tmp_path / "whole")
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name
