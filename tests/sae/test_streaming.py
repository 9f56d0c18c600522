import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.sae.shuffling import ShuffledBatches
from hf_gradtools.sae.streaming import ModelActivations
from tests.sae.tiny_models import CONTEXT, MODELS, WIDTH, gpt2, llama, make_sequences


NAMES = ["layers.0", "layers.1"]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def joined(chunks, name="layers.0"):
    return torch.cat([chunk[name] for chunk in chunks])


class Numbers:
    """A source whose activation of token t is t, in pieces of odd lengths."""

    hookpoints, dtype = ["layers.0"], torch.float32

    def __init__(self, num_tokens, piece=5):
        self.num_tokens, self.piece, self.read = num_tokens, piece, []

    def d_in(self, hookpoint):
        return 2

    def chunks(self, start=0, end=None):
        self.read.append((start, end))
        for first in range(start, end, self.piece):
            ids = torch.arange(first, min(first + self.piece, end), dtype=torch.float32)
            yield {"layers.0": ids[:, None].expand(-1, 2)}


def tokens_of(batches):
    return [batch["layers.0"][:, 0].int().tolist() for batch in batches]


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_activations_are_the_hidden_states_without_the_first_positions(model, skip):
    sequences = make_sequences(5)
    source = ModelActivations(model, sequences, NAMES, batch_size=2, dtype=torch.float32, skip_positions=skip)
    with torch.no_grad():
        states = [model(batch, output_hidden_states=True).hidden_states for batch in sequences.split(2)]
    for i, name in enumerate(NAMES):
        expected = torch.cat([state[i + 1] for state in states])[:, skip:].reshape(-1, WIDTH)
        assert torch.equal(joined(source, name), expected)
    assert source.num_tokens == len(expected) == 5 * (CONTEXT - skip)
    assert source.d_in("layers.0") == WIDTH


def test_every_part_has_the_bits_of_the_whole():
    source = ModelActivations(llama(), make_sequences(5), NAMES, batch_size=2)
    whole = joined(source)
    assert whole.dtype == torch.bfloat16
    for start, end in [(0, 1), (15, 17), (33, 79), (16, 64), (79, 80), (40, 40)]:
        parts = list(source.chunks(start, end))
        assert torch.equal(joined(parts), whole[start:end]) if parts else start == end
    with pytest.raises(ValueError, match="start=3, end=81 are not within the 80 tokens"):
        source.chunks(3, 81)


def test_modes_of_the_modules_stay_as_they_were():
    model = gpt2().train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    trained = joined(ModelActivations(model, make_sequences(2), NAMES))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(trained, joined(ModelActivations(gpt2(), make_sequences(2), NAMES)))  # without dropout


def out_of_memory_above(model, sequences, error):
    """Lets forwards of more sequences fail at block 1, after block 0 was captured."""

    def check(module, args):
        if len(args[0]) > sequences:
            raise error

    model.model.layers[1].register_forward_pre_hook(check)
    return model


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   RuntimeError("DefaultCPUAllocator: not enough memory")])  # fmt: skip
def test_batches_are_halved_until_they_fit_and_no_token_is_lost(error, caplog):
    sequences = make_sequences(19)
    whole = joined(ModelActivations(llama(), sequences, NAMES, batch_size=8, dtype=torch.float32), "layers.1")
    model = out_of_memory_above(llama(), 3, error)
    with caplog.at_level(logging.WARNING):
        source = ModelActivations(model, sequences, NAMES, batch_size=8, dtype=torch.float32)
        tokens = joined(source, "layers.1")
    assert [record.args[0] for record in caplog.records] == [8, 4]
    assert "out of memory at 8 sequences of 17 tokens" in caplog.text
    assert source.forward_size == 2
    torch.testing.assert_close(tokens, whole, rtol=1e-5, atol=1e-6)


def test_memory_for_not_even_one_sequence_and_other_errors_are_raised():
    model = out_of_memory_above(llama(), 3, torch.OutOfMemoryError("CUDA out of memory"))
    source = ModelActivations(model, make_sequences(4), NAMES, batch_size=4)
    out_of_memory_above(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        joined(source)
    assert source.forward_size == 1
    source = ModelActivations(llama(), make_sequences(4), NAMES, batch_size=4)
    out_of_memory_above(source.model, 0, RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        joined(source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": torch.empty(0, 5, dtype=torch.long)}, r"sequences has shape \(0, 5\)"),
        ({"sequences": torch.zeros(2, 65, dtype=torch.long)}, "context_length=65, the model takes 64 positions"),
        ({"sequences": torch.full((2, 5), 64)}, "hold token 64, outside the model's vocabulary of 64"),
        ({"sequences": torch.full((2, 5), -1)}, "hold token -1"),
        ({"skip_positions": CONTEXT}, "skip_positions=17 leaves none of context_length=17"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"hookpoints": ["layers.7"]}, "hookpoint='layers.7'"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ModelActivations(**{"model": llama(), "sequences": make_sequences(2), "hookpoints": NAMES, **options})


def naive_order(num_tokens, batch, buffer, seed, epoch):
    blocks = [list(range(first, min(first + buffer, num_tokens))) for first in range(0, num_tokens, buffer)]
    order = []
    for block in np.random.default_rng([seed, epoch, 0]).permutation(len(blocks)):
        shuffle = np.random.default_rng([seed, epoch, 1 + int(block)]).permutation(len(blocks[block]))
        order += [blocks[block][place] for place in shuffle]
    return [order[i : i + batch] for i in range(0, num_tokens - batch + 1, batch)]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 70), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_depends_on_nothing_but_seed_epoch_block_and_tokens(num_tokens, batch, buffer, piece, seed):
    batch = min(batch, num_tokens)
    batches = ShuffledBatches(Numbers(num_tokens, piece), batch, buffer, seed, epochs=2)
    expected = [rows for epoch in (0, 1) for rows in naive_order(num_tokens, batch, buffer, seed, epoch)]
    assert tokens_of(batches) == expected
    assert len(batches) == len(expected) == 2 * (num_tokens // batch)


@pytest.mark.parametrize(("batch", "buffer"), [(4, 10), (7, 7), (9, 4), (5, 100)])
def test_resuming_at_any_batch_gives_the_rest_and_reads_no_block_before(batch, buffer):
    batches = ShuffledBatches(Numbers(47), batch, buffer, seed=1, epochs=2)
    whole = tokens_of(batches)
    blocks = batches.source.read
    for start in range(len(whole) + 1):
        batches.source.read = []
        assert tokens_of(batches.iterate(start)) == whole[start:]
        assert batches.source.read == blocks[len(blocks) - len(batches.source.read) :]
    batches.source.read = []
    next(batches.iterate(len(whole) // 2 + 1))
    assert len(batches.source.read) <= 1 + -(-batch // buffer)
    for start in (-1, len(whole) + 1):
        with pytest.raises(ValueError, match=f"start_batch={start} is outside"):
            batches.iterate(start)


def test_an_epoch_has_each_token_once_but_the_last_short_batch():
    batches = tokens_of(ShuffledBatches(Numbers(47), 5, 10, epochs=2))
    first, second = (sum(batches[start : start + 9], []) for start in (0, 9))
    assert len(set(first)) == len(set(second)) == 45
    assert first != second


def test_batches_are_copies():
    kept = list(ShuffledBatches(Numbers(40), 5, 10))
    assert tokens_of(kept) == tokens_of(ShuffledBatches(Numbers(40), 5, 10))


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"buffer_tokens": 0}, {"epochs": 0}, {"batch_tokens": 48}])
def test_bad_batches_are_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ShuffledBatches(Numbers(47), **{"batch_tokens": 5, **options})
