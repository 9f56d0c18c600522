import re
import subprocess
import sys
import time

import pytest
import torch

from hf_gradtools.core.checksums import StoreCorruptError
from hf_gradtools.core.store import RowStore, StoreMismatchError
from hf_gradtools.sae.extraction import extract
from hf_gradtools.sae.shuffling import ShuffledBatches
from hf_gradtools.sae.store import ActivationStore
from hf_gradtools.sae.streaming import ModelActivations
from tests.sae.killed_extraction import run
from tests.sae.tiny_models import LAYERS, MODELS, WIDTH, gpt2, llama, make_sequences


NAMES = ["layers.0", "layers.2"]
OPTIONS = {"batch_size": 2, "rows_per_shard": 40, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Of 9 sequences: 144 tokens in 4 shards. Not to be written to."""
    return extract(llama(), make_sequences(9), NAMES, tmp_path_factory.mktemp("store"), **OPTIONS)


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def whole(hookpoint, dtype=torch.bfloat16, batch_size=2, count=9):
    source = ModelActivations(llama(), make_sequences(count), [hookpoint], batch_size, dtype)
    return torch.cat([chunk[hookpoint] for chunk in source])


def test_a_store_holds_the_bits_that_the_model_gives(store):
    assert store.hookpoints == NAMES
    assert store.num_tokens == 144
    assert store.complete
    for name in NAMES:
        assert store.d_in(name) == WIDTH
        assert torch.equal(store.read(name), whole(name))
        for start, end in [(0, 1), (39, 41), (35, 130), (143, 144), (7, 7)]:
            assert torch.equal(store.read(name, start, end), whole(name)[start:end])


def test_reading_within_a_batch_copies_nothing(store):
    first, second = store.read("layers.0", 3, 20), store.read("layers.0", 4, 9)
    assert second.data_ptr() == first[1].data_ptr()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_each_dtype_reads_back_as_it_was(dtype, tmp_path):
    store = extract(llama(), make_sequences(3), ["layers.1"], tmp_path, dtype=dtype, **OPTIONS)
    expected = whole("layers.1", getattr(torch, dtype), count=3)
    assert store.read("layers.1").dtype == expected.dtype
    assert torch.equal(store.read("layers.1"), expected)


def test_token_ids_and_places_belong_to_the_rows(store):
    sequences = store.sequences()
    assert torch.equal(sequences, make_sequences(9))
    assert store.place(0) == (0, 1)
    assert store.place(143) == (8, 16)
    states = llama()(sequences[:4], output_hidden_states=True).hidden_states[1].detach()
    sequence, position = store.place(37)
    torch.testing.assert_close(store.read("layers.0", 37, 38)[0], states[sequence, position].bfloat16())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_model_and_store_give_the_same_batches_bit_for_bit(make, dtype, tmp_path):
    sequences, cast = make_sequences(9), getattr(torch, dtype)
    store = extract(make(), sequences, NAMES, tmp_path, dtype=dtype, **OPTIONS)
    model = ModelActivations(make(), sequences, NAMES, batch_size=2, dtype=cast)
    streamed, stored = (list(ShuffledBatches(s, 11, 50, seed=3, epochs=2)) for s in (model, store.source()))
    assert len(streamed) == len(stored) == 2 * (144 // 11)
    for one, other in zip(streamed, stored, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in NAMES)
    single = list(ShuffledBatches(store.source("layers.2"), 11, 50, seed=3, epochs=2).iterate(9))
    assert all(torch.equal(a["layers.2"], b["layers.2"]) for a, b in zip(single, stored[9:], strict=True))


def test_hookpoints_of_other_widths_and_a_dtype_to_train_in(tmp_path):
    names = ["layers.0.mlp.up_proj", "layers.0"]
    store = extract(llama(), make_sequences(3), names, tmp_path, **OPTIONS)
    source = store.source(names, dtype=torch.float32)
    chunks = list(source.chunks(5, 47))
    for name, width in zip(names, (48, WIDTH), strict=True):
        rows = torch.cat([chunk[name] for chunk in chunks])
        assert rows.shape == (42, source.d_in(name)) == (42, width)
        assert torch.equal(rows, store.read(name, 5, 47).float())


def test_hookpoints_extracted_one_by_one_make_the_same_files(store, tmp_path):
    for name in NAMES:
        extract(llama(), make_sequences(9), [name], tmp_path, **OPTIONS)
    assert files_of(tmp_path) == files_of(store.path)


def test_a_finished_store_is_left_alone(store):
    before = {file: file.stat().st_mtime_ns for file in store.path.rglob("*.arrow")}
    extract(llama(), make_sequences(9), NAMES, store.path, **OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in store.path.rglob("*.arrow")} == before


class Interrupted(Exception):
    pass


def interrupted_after(forwards):
    model, left = llama(), [forwards + 1]  # one to find the widths

    def count(*_):
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1

    model.model.register_forward_pre_hook(count)
    return model


@pytest.mark.parametrize("forwards", range(5))
def test_a_run_stopped_between_forwards_goes_on_to_the_same_files(forwards, store, tmp_path):
    with pytest.raises(Interrupted):
        extract(interrupted_after(forwards), make_sequences(9), NAMES, tmp_path, **OPTIONS)
    begun = ActivationStore.open(tmp_path)
    assert begun.num_tokens == 32 * forwards
    with pytest.raises(ValueError, match=f"'layers.0' of .* has {32 * forwards} of 144 tokens"):
        begun.source()
    assert torch.equal(begun.read("layers.2"), whole("layers.2")[: 32 * forwards])
    extract(llama(), make_sequences(9), NAMES, tmp_path, **OPTIONS)
    assert files_of(tmp_path) == files_of(store.path)


@pytest.mark.parametrize("appends", [1, 2, 3, 4, 7])
def test_hookpoints_that_are_not_equally_far_each_take_what_they_lack(appends, store, tmp_path, monkeypatch):
    left, append = [appends], RowStore.append

    def fail_at_last(self, columns):
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        append(self, columns)

    monkeypatch.setattr(RowStore, "append", fail_at_last)
    with pytest.raises(Interrupted):
        extract(llama(), make_sequences(9), NAMES, tmp_path, **OPTIONS)
    monkeypatch.undo()
    counts = {name: ActivationStore.open(tmp_path).num_tokens_of(name) for name in NAMES}
    assert len(set(counts.values())) == 2 or appends == 2
    extract(llama(), make_sequences(9), NAMES, tmp_path, **OPTIONS)
    assert files_of(tmp_path) == files_of(store.path)


def test_shards_do_not_depend_on_the_size_of_a_forward(store, tmp_path):
    other = extract(llama(), make_sequences(9), NAMES, tmp_path, **{**OPTIONS, "batch_size": 4})
    assert files_of(tmp_path).keys() == files_of(store.path).keys()
    torch.testing.assert_close(other.read("layers.2"), store.read("layers.2"))


def test_ranks_share_the_sequences(store, tmp_path):
    with pytest.raises(ValueError, match="too few for world_size=10"):
        extract(llama(), make_sequences(9), NAMES, tmp_path, rank=0, world_size=10, **OPTIONS)
    for rank in (1, 0):
        made = extract(llama(), make_sequences(9), NAMES, tmp_path, rank=rank, world_size=2, **OPTIONS)
        assert made.complete == (rank == 0)
    torch.testing.assert_close(made.read("layers.2"), store.read("layers.2"))
    assert made.source().num_tokens == 144


def kill_and_compare(tmp_path, kills):
    """How many of the runs were killed before their end; the last one's files are those of a run nobody killed."""
    run(tmp_path / "warm")
    start = time.perf_counter()
    run(tmp_path / "whole")
    seconds = time.perf_counter() - start
    script = [sys.executable, "-m", "tests.sae.killed_extraction", str(tmp_path / "killed"), str(kills), str(seconds)]
    done = subprocess.run(script, check=True, timeout=250, capture_output=True, text=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    return done.stdout.split().count("killed")


def test_a_run_killed_at_random_moments_ends_in_the_same_files(tmp_path):
    assert kill_and_compare(tmp_path, 5) >= 2


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_in_the_same_files(tmp_path):
    assert kill_and_compare(tmp_path, 20) >= 10


def damaged(store, tmp_path, name, place):
    for file, content in files_of(store.path).items():
        copy = tmp_path / file
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    return ActivationStore.open(tmp_path)


def test_a_flipped_byte_is_named_with_hookpoint_and_rows(store, tmp_path):
    assert store.verify() > 2 * 144 * WIDTH * 2
    broken = damaged(store, tmp_path, "layers.2/shard-00000-00001.arrow", 1500)
    with pytest.raises(StoreCorruptError, match=r"layers\.2/shard-00000-00001\.arrow.*rows 40-79 of the store"):
        broken.verify()


def test_a_shard_that_cannot_be_read_is_named(store, tmp_path):
    broken = damaged(store, tmp_path, "layers.0/shard-00000-00002.arrow", 5)  # in the Arrow header
    with pytest.raises(StoreCorruptError, match=r"layers\.0 is damaged: shard-00000-00002\.arrow"):
        broken.read("layers.0")
    assert len(broken.read("layers.2")) == 144


def test_a_flipped_token_id_is_noticed(store, tmp_path):
    broken = damaged(store, tmp_path, "tokens.safetensors", -3)
    with pytest.raises(ValueError, match=r"tokens\.safetensors is not what was written"):
        broken.verify()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequences": make_sequences(8)}, "num_tokens: stored 144, given 128"),
        ({"sequences": make_sequences(9).flip(0)}, "sequences: stored"),
        ({"model": llama(seed=1)}, "weights: stored"),
        ({"model": gpt2()}, "model: stored 'LlamaForCausalLM', given 'GPT2LMHeadModel'"),
        ({"dtype": "float32"}, "dtype: stored 'bfloat16', given 'float32'"),
        ({"skip_positions": 0}, "skip_positions: stored 1, given 0"),
        ({"tokenizer_name": "other"}, "tokenizer: stored None, given 'other'"),
        ({"corpus": {"split": "test"}}, "corpus.split: stored '<absent>', given 'test'"),
        ({"world_size": 2}, "world_size: stored 1, given 2"),
    ],
)
def test_another_identity_is_refused(store, change, named):
    given = {"model": llama(), "sequences": make_sequences(9), **OPTIONS, **change}
    with pytest.raises(StoreMismatchError, match=re.escape(named)):
        extract(hookpoints=NAMES, output_dir=store.path, **given)


def test_another_hookpoint_of_other_texts_is_refused(store, tmp_path):
    damaged(store, tmp_path, "tokens.safetensors", -1)
    with pytest.raises(StoreMismatchError, match="holds other sequences"):
        extract(llama(), make_sequences(9).flip(0), ["layers.1"], tmp_path, **OPTIONS)


def test_activations_too_large_for_float16_are_named(tmp_path):
    model = llama()
    model.model.embed_tokens.weight.data[7] = 1e5
    sequences = make_sequences(3)
    sequences[sequences == 7] = 8
    sequences[1, 4] = 7
    with pytest.raises(ValueError, match=r"'layers.0' has an activation that is not finite at token 19 .*float16"):
        extract(model, sequences, ["layers.0"], tmp_path / "half", dtype="float16", **OPTIONS)
    assert extract(model, sequences, ["layers.0"], tmp_path / "brain", **OPTIONS).complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"rank": 1}, "rank=1 is not one of world_size=1"),
        ({"hookpoints": []}, r"hookpoints=\[\] are none"),
        ({"hookpoints": ["layers.0"] * 2}, "or one twice"),
        ({"hookpoints": [f"layers.{LAYERS}"]}, "hookpoint='layers.3' names no module"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(options, message, tmp_path):
    given = {"model": llama(), "sequences": make_sequences(2), "hookpoints": NAMES, **options}
    with pytest.raises(ValueError, match=message):
        extract(output_dir=tmp_path, **given)
    assert not list(tmp_path.iterdir())


def test_reading_what_is_not_there_is_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"hookpoint='layers.1' is not in .* It has layers.0, layers.2"):
        store.read("layers.1")
    with pytest.raises(ValueError, match="start=0, end=145 are not within the 144 tokens"):
        store.read("layers.0", 0, 145)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no activations"):
            ActivationStore.open(path)
