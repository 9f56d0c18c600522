"""Gradients go to disk and come back: types, ranks, blocks, errors, and what survives a kill."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.core import store as core_store
from hf_gradtools.core.checksums import StoreCorruptError
from hf_gradtools.core.store import RowStore, StoreMismatchError
from hf_gradtools.ghost.gradproj.store import GradientStore, GradientWriter


IDENTITY = {"model_class": "GPT2LMHeadModel", "layers": ["a", "b"], "seed": 0}
TOLERANCE = {"float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2}


def write(path, gradients, *, dtype="float32", finish=True, step=7, identity=IDENTITY, **options):
    with GradientWriter(path, identity, dim=gradients.shape[1], dtype=dtype, **options) as writer:
        for first in range(0, len(gradients), step):
            part = gradients[first : first + step]
            ids = list(range(100 + first, 100 + first + len(part)))
            writer.append({"sample_id": ids, "gradient": part, "loss": part.norm(dim=1)})
        if finish:
            writer.finish()
    return GradientStore.open(path)


def all_rows(store, max_bytes=2**20):
    return torch.cat([block.clone() for _, block in store.blocks(max_bytes)])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("finish", [True, False])
def test_gradients_come_back_as_they_went_in(tmp_path, dtype, finish, datasets_cache):
    gradients = torch.randn(40, 6)
    store = write(tmp_path / "store", gradients, dtype=dtype, finish=finish, rows_per_shard=16)
    assert (len(store), store.dim, store.dtype, store.complete) == (40, 6, dtype, finish)
    assert torch.allclose(all_rows(store), gradients, rtol=TOLERANCE[dtype], atol=0)
    assert torch.equal(store.rows([39, 0, 16, 16]), all_rows(store)[[39, 0, 16, 16]])
    assert store.sample_ids.tolist() == list(range(100, 140))
    assert np.allclose(store.column("loss"), gradients.norm(dim=1))
    dataset = store.to_dataset()
    assert np.array_equal(np.array(dataset[30:]["gradient"]), all_rows(store)[30:].numpy())
    assert dataset["sample_id"][:2] == [100, 101]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 60), dim=st.integers(1, 9), step=st.integers(1, 20), shard=st.integers(1, 30),
    block=st.integers(1, 70), batch=st.integers(1, 25), dtype=st.sampled_from(["float16", "float32"]),
)  # fmt: skip
def test_blocks_of_any_size_hold_every_row_once(tmp_path_factory, rows, dim, step, shard, block, batch, dtype):
    gradients = torch.arange(rows * dim, dtype=torch.float32).view(rows, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_store, "ROWS_PER_SEALED_BATCH", batch)
        folder = tmp_path_factory.mktemp("store")
        store = write(folder, gradients, step=step, rows_per_shard=shard, finish=rows % 2 == 0, dtype=dtype)
    blocks = [(first, part.clone()) for first, part in store.blocks(4 * dim * block)]
    assert [first for first, _ in blocks] == list(range(0, rows, block))
    assert torch.equal(torch.cat([torch.empty(0, dim), *(part for _, part in blocks)]), gradients)
    chosen = torch.randperm(rows)
    assert torch.equal(store.rows(chosen), gradients[chosen])


def test_ranks_follow_each_other(tmp_path):
    gradients = torch.randn(10, 4)
    for rank in (1, 0):
        write(tmp_path, gradients[5 * rank : 5 * rank + 5], rank=rank)
    assert torch.equal(all_rows(GradientStore.open(tmp_path)), gradients)


def test_a_store_opened_while_it_is_written_keeps_its_rows(tmp_path):
    gradients = torch.randn(20, 4)
    writer = GradientWriter(tmp_path, IDENTITY, dim=4, dtype="float32")
    writer.append({"sample_id": list(range(8)), "gradient": gradients[:8]})
    store = GradientStore.open(tmp_path)
    writer.append({"sample_id": list(range(8, 20)), "gradient": gradients[8:]})
    for _ in range(2):
        assert len(store) == len(store.sample_ids) == 8
        assert torch.equal(all_rows(store), gradients[:8])
        assert torch.equal(store.rows([7, 0]), gradients[[7, 0]])
        writer.finish()
        store._sample_ids = None


def test_any_columns_may_go_along(tmp_path):
    with GradientWriter(tmp_path, IDENTITY, dim=2) as writer:
        columns = {"sample_id": ["a", "b"], "num_tokens": torch.tensor([3, 4]), "text": ["x", None]}
        writer.append({**columns, "gradient": torch.ones(2, 2, requires_grad=True)})
    store = GradientStore.open(tmp_path)
    assert store.column_names == ["sample_id", "num_tokens", "text"]
    assert store.sample_ids.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match=r"name='loss'.*\['sample_id', 'num_tokens', 'text'\]"):
        store.column("loss")


def test_info_has_the_stores_own_numbers(tmp_path):
    store = write(tmp_path, torch.randn(40, 6), rows_per_shard=16, extra={"model": "user/model"})
    info = store.info()
    expected = {"rows": 40, "dim": 6, "dtype": "float32", "complete": True, "layers": 2, "model": "user/model"}
    assert {key: info[key] for key in expected} == expected
    assert info["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.arrow"))
    assert (info["shards"], info["bytes_per_sample"]) == (2, info["bytes"] / 40)
    assert info["projection"] == {"model_class": "GPT2LMHeadModel", "seed": 0}


def test_verify_names_a_flipped_byte(tmp_path):
    store = write(tmp_path, torch.randn(40, 6))
    assert store.verify().rows == 40
    content = bytearray((tmp_path / "shard-00000-00000.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "shard-00000-00000.arrow").write_bytes(content)
    with pytest.raises(StoreCorruptError, match=r"shard-00000-00000.arrow.*rows 0-39"):
        store.verify()


def test_resuming_appends_and_another_identity_is_refused(tmp_path):
    write(tmp_path, torch.randn(5, 4), finish=False)
    with GradientWriter(tmp_path, IDENTITY, dim=4, dtype="float32") as writer:
        assert (writer.num_rows, writer.complete) == (5, False)
    with pytest.raises(StoreMismatchError, match="dtype: stored 'float32', given 'float16'"):
        GradientWriter(tmp_path, IDENTITY, dim=4)
    with pytest.raises(StoreMismatchError, match="seed: stored 0, given 1"):
        GradientWriter(tmp_path, {**IDENTITY, "seed": 1}, dim=4, dtype="float32")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "float32", "sample_id=12 is not finite"),
        (float("inf"), "float16", "sample_id=12 is not finite"),
        (-1e5, "float16", r"sample_id=12 reaches 1e\+05, too large for float16"),
        (3.4e38, "bfloat16", "too large for bfloat16"),
    ],
)
def test_a_number_that_cannot_be_stored_is_refused_with_its_sample(tmp_path, value, dtype, message):
    gradients = torch.ones(4, 3)
    gradients[2, 1] = value
    with GradientWriter(tmp_path, IDENTITY, dim=3, dtype=dtype) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append({"sample_id": [10, 11, 12, 13], "gradient": gradients})
        assert writer.num_rows == 0


def test_numbers_that_float16_loses_are_warned_of_once(tmp_path):
    with GradientWriter(tmp_path, IDENTITY, dim=3) as writer:
        with pytest.warns(UserWarning, match="sample_id='b' has norm 1.73e-08"):
            writer.append({"sample_id": ["a", "b"], "gradient": torch.tensor([[0.0] * 3, [1e-8] * 3])})
        writer.append({"sample_id": ["c"], "gradient": torch.full((1, 3), 1e-8)})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"gradient": torch.ones(2, 3)}, r"lack \['sample_id'\]"),
        ({"sample_id": [1, 2]}, r"lack \['gradient'\]"),
        ({"sample_id": [1, 2], "gradient": torch.ones(2, 4)}, r"shape \(2, 4\); it needs \[rows, dim=3\]"),
        ({"sample_id": [1], "gradient": torch.ones(2, 3)}, r"2 rows of 'gradient': \{'sample_id': 1\}"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        GradientWriter(tmp_path, IDENTITY, dim=3).append(columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 3, "dtype": "int8"}, "dtype='int8' is unknown. Pass one of float16, float32, bfloat16"),
        ({"dim": 4, "identity": {"dim": 3}}, r"identity holds \{'dim': 3\}"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GradientWriter(tmp_path, **{"identity": IDENTITY, **options})


def test_a_folder_of_other_rows_is_refused(tmp_path):
    RowStore(tmp_path, {"kind": "ghost_dot_products"})
    with pytest.raises(ValueError, match="is a store of 'ghost_dot_products', not of 'gradient_projections'"):
        GradientStore.open(tmp_path)
    with pytest.raises(ValueError, match="holds no row store"):
        GradientStore.open(tmp_path / "nothing")


def test_rows_beyond_the_last_are_refused(tmp_path):
    store = write(tmp_path, torch.randn(5, 4))
    for wrong in ([5], [-1]):
        with pytest.raises(IndexError, match=r"rows 0 to 4"):
            store.rows(wrong)


class Projector:
    def __init__(self, **identity):
        self.given = identity

    def adopt(self, store):
        self.adopted = store

    def identity(self):
        return self.given


def test_only_a_projector_of_the_same_gradients_can_be_bound(tmp_path):
    store = write(tmp_path, torch.randn(5, 4), identity={**IDENTITY, "dataset": "0f", "world_size": 2})
    same = Projector(**{**IDENTITY, "layers": ("a", "b")})
    assert store.bind(same).projector is same
    assert same.adopted == tmp_path
    with pytest.raises(StoreMismatchError, match=r"does not compare with the projector: seed: stored 0, given 3"):
        store.bind(Projector(**{**IDENTITY, "seed": 3}))
    with pytest.raises(StoreMismatchError, match=r"dim: stored 4, given 5"):
        store.bind(Projector(**IDENTITY, dim=5))
    assert store.projector is same


def test_streaming_keeps_resident_memory_far_below_the_stores_size(tmp_path):
    write(tmp_path, torch.ones(40_000, 1024), dtype="float16", step=10_000)
    code = f"""
import resource, sys
from hf_gradtools.ghost.gradproj.store import GradientStore
store = GradientStore.open({str(tmp_path)!r})
next(store.blocks())[1].sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _, block in store.blocks():
    block.sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 30_000 < store_kib(tmp_path) / 2


def store_kib(path):
    return sum(file.stat().st_size for file in path.iterdir()) / 1024


KILLED = """
import sys, torch
from hf_gradtools.ghost.gradproj.store import GradientWriter
writer = GradientWriter(sys.argv[1], {"seed": 0}, dim=4, dtype="float32", rows_per_shard=50)
for row in range(writer.num_rows, 10**9):
    writer.append({"sample_id": [row], "gradient": torch.full((1, 4), float(row))})
    if row % 10 == 0:
        print(row, flush=True)
"""


def test_sigkill_loses_no_row_and_doubles_none(tmp_path):
    for wait in (0.0, 0.03):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(wait)
            writer.send_signal(signal.SIGKILL)
        store = GradientStore.open(tmp_path)
        assert store.sample_ids.tolist() == list(range(len(store)))
        assert torch.equal(all_rows(store)[:, 0], torch.arange(len(store)).float())
        store.verify()
