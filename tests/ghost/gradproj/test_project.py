"""`GradProjector.project`: rows of a dataset in its order, resumed, refused, shared by processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_gradtools.core.checksums import StoreCorruptError
from hf_gradtools.core.store import StoreMismatchError
from hf_gradtools.ghost.gradproj.batches import plan_windows, share_of_rank
from hf_gradtools.ghost.gradproj.projector import GradProjector
from hf_gradtools.ghost.gradproj.store import GradientStore
from tests.distributed.test_distributed import torchrun
from tests.ghost.gradproj.reference_projection import error, expected_rows
from tests.ghost.reference import gpt2, llama, rows


DATA = rows(23)


def project(path, model=None, data=DATA, batch_size=3, window_rows=8, **options):
    projector = GradProjector(llama() if model is None else model, **{"proj_rank_total": 64, **options})
    return projector.project(data, output_dir=path, batch_size=batch_size, window_rows=window_rows)


def stored(store):
    return store.rows(range(len(store)))


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_rows_are_in_the_datasets_order(dtype, tolerance, tmp_path):
    store = project(tmp_path, dtype=dtype)
    assert store.complete
    assert store.sample_ids.tolist() == list(range(23))
    assert error(stored(store), expected_rows(store.projector, DATA)) < tolerance
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in DATA]
    assert store.column("num_tokens").tolist() == tokens
    assert os.path.getsize(tmp_path / "shard-00000-00000.arrow") < 23 * (64 * 4 + 16) + 3000


def test_own_ids_and_bases_of_main_directions_are_kept(tmp_path):
    data = DATA.add_column("sample_id", [f"doc-{i}" for i in range(23)])
    store = project(tmp_path / "pca", data=data, basis="pca", dtype="float32")
    assert list(store.sample_ids) == [f"doc-{i}" for i in range(23)]
    again = GradProjector(llama(), proj_rank_total=64, basis="pca", dtype="float32")
    GradientStore.open(tmp_path / "pca").bind(again)
    torch.testing.assert_close(again.gradients(data, batch_size=3), stored(store), rtol=1e-4, atol=1e-6)
    store.verify()
    bases = tmp_path / "pca" / "bases.safetensors"
    content = bytearray(bases.read_bytes())
    content[-5] ^= 1
    bases.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=r"bases\.safetensors"):
        store.verify()


def test_a_store_is_searched_by_rows_and_finds_each_of_its_own(tmp_path):
    store = project(tmp_path)
    found = store.search(DATA.select([4, 11]), k=2, metric="cosine")
    assert [row["sample_id"] for row in found if row["rank"] == 1] == [4, 11]
    reopened = GradientStore.open(tmp_path).bind(GradProjector(llama(), proj_rank_total=64))
    assert reopened.search([DATA[4]], k=1)[0]["sample_id"] == found[0]["sample_id"]


def test_a_finished_store_is_not_made_again(tmp_path):
    project(tmp_path)
    before = contents(tmp_path)
    projector = GradProjector(llama(), proj_rank_total=64, on_uncovered="ignore")
    projector._pass.loss = None  # a pass would fail
    projector.project(DATA, output_dir=tmp_path, batch_size=3, window_rows=8)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: stored 0, given 1"),
        ({"proj_rank_total": 32}, "proj_rank_total: stored 64, given 32"),
        ({"rank": 3}, "rank: stored 'auto', given"),
        ({"layers": [r"q_proj", r"v_proj"]}, "layers: stored"),
        ({"basis": "gaussian"}, "basis: stored 'orthonormal', given 'gaussian'"),
        ({"loss_reduction": "sum"}, "loss_reduction: stored 'mean', given 'sum'"),
        ({"model": "other"}, "weights: stored"),
        ({"model": "gpt2"}, "model_class: stored 'LlamaForCausalLM', given 'GPT2LMHeadModel'"),
        ({"data": rows(23, seed=5)}, "dataset.content: stored"),
        ({"data": DATA.map(lambda row: {"labels": row["input_ids"]})}, "dataset.content: stored"),
    ],
)
def test_a_store_of_other_gradients_is_refused(change, named, tmp_path):
    project(tmp_path)
    before = contents(tmp_path)
    if "model" in change:
        model = gpt2() if change["model"] == "gpt2" else llama()
        next(model.parameters()).data += 0.1
        change = {"model": model}
    with pytest.raises(StoreMismatchError) as caught:
        project(tmp_path, **change)
    assert named in str(caught.value)
    assert contents(tmp_path) == before


def test_another_model_cannot_query(tmp_path):
    project(tmp_path)
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data += 0.1
    with pytest.raises(StoreMismatchError, match="weights"):
        GradientStore.open(tmp_path).bind(GradProjector(other, proj_rank_total=64))


def test_rows_without_labels_are_zeros_and_told(tmp_path, caplog):
    data = DATA.map(lambda row, i: {"labels": [-100] * 14 if i in (2, 5) else row["labels"]}, with_indices=True)
    store = project(tmp_path, data=data, batch_size=1)
    assert "2 rows have no label that counts" in caplog.text
    zero = (stored(store) == 0).all(1).nonzero().flatten()
    assert zero.tolist() == [2, 5]
    assert store.column("num_tokens")[[2, 5]].tolist() == [0, 0]
    with pytest.raises(ValueError, match="row 1 has no label that counts"):
        store.search(data.select([1, 2]), k=1)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="dataset has 0 rows"):
        project(tmp_path, data=DATA.select([]))
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        project(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="no 'labels'"):
        project(tmp_path, data=DATA.remove_columns("labels"))
    with pytest.raises(ValueError, match="no 'input_ids'"):
        project(tmp_path, data=[{"text": "a"}])
    with pytest.raises(ValueError, match=r"layers='nowhere' matches no module"):
        project(tmp_path, layers="nowhere")
    for options, named in [
        ({"stages": 3}, "stages=3"),
        ({"basis": "fourier"}, "basis='fourier'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": (1, 2, 3)}, "rank="),
        ({"rank": "auto", "stages": 1}, "needs the second stage"),
        ({"rank": 4, "stages": 1}, "both say"),
        ({"proj_rank_total": 0}, "proj_rank_total=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ]:
        with pytest.raises(ValueError, match=named):
            project(tmp_path, **options)
    with pytest.raises(ValueError, match="cannot be loaded"):
        GradProjector("no/such-model-here")
    with pytest.raises(ValueError, match="optimizer_state"):
        project(tmp_path / "x").search(DATA.select([0]), k=1, precondition="adam")
    assert not list(tmp_path.glob("shard-*"))


def test_a_model_folder_will_do(tiny_model, tmp_path):
    data = [{"input_ids": [9, 10, 11 + i], "labels": [9, 10, 11 + i]} for i in range(4)]
    store = GradProjector(str(tiny_model), proj_rank_total=32).project(data, output_dir=tmp_path)
    assert len(store) == 4
    assert store.info()["model"] == tiny_model.name  # no path of this machine


# ---- batches


def test_windows_keep_rows_together_and_like_lengths_in_a_batch():
    lengths = [5, 1, 9, 5, 2, 8, 1, 7, 3, 3]
    windows = plan_windows(lengths, 4, 2)
    assert [(w.start, w.stop) for w in windows] == [(0, 4), (4, 8), (8, 10)]
    assert windows[0].batches == [[2, 0], [3, 1]]
    assert sorted(i for w in windows for batch in w.batches for i in batch) == list(range(10))
    shares = [share_of_rank(windows, rank, 2) for rank in range(2)]
    assert [w.start for share in shares for w in share] == [0, 4, 8]


# ---- kills and processes


def test_killed_twenty_times_at_random_moments(tmp_path):
    """Rows complete, each once, and the bytes those of a run that nobody disturbed."""
    script = [sys.executable, "-m", "tests.ghost.gradproj.killed_projection"]
    subprocess.run([*script, str(tmp_path / "whole"), "0"], check=True, timeout=120)
    subprocess.run([*script, str(tmp_path / "killed"), "20"], check=True, timeout=250)
    store = GradientStore.open(tmp_path / "killed")
    store.verify()
    assert store.complete
    assert store.sample_ids.tolist() == list(range(120))
    whole = GradientStore.open(tmp_path / "whole")
    assert np.array_equal(stored(store).numpy(), stored(whole).numpy())
    assert [f for f in os.listdir(tmp_path / "killed") if f.endswith(".tmp")] == []
    assert b"".join(contents(tmp_path / "killed").values()) == b"".join(contents(tmp_path / "whole").values())


@pytest.mark.distributed
def test_two_ranks_write_what_one_does(tmp_path):
    torchrun("tests.distributed.run_projection", tmp_path / "two")
    one, two = project(tmp_path / "one"), GradientStore.open(tmp_path / "two")
    assert two.complete
    assert two.sample_ids.tolist() == one.sample_ids.tolist()
    assert torch.equal(stored(one), stored(two))
    assert len(list((tmp_path / "two").glob("shard-*.arrow"))) == 2
