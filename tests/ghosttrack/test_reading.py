"""Reading texts: against a loop over tokens, in any batches, after kills, and of input that does not fit."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from hf_gradtools.ghosttrack.reading.reading import Reading, read_texts
from tests.ghosttrack.tiny_detection import FEATURES, HOOKPOINTS, PROMPT, load, make_saes, make_texts


TEXTS, STARTS, _, _ = make_texts(9)


@pytest.fixture(scope="module")
def parts(tiny_model):
    return (*load(tiny_model), make_saes())


def read(parts, texts=TEXTS, starts=STARTS, **options):
    return read_texts(*parts, texts, starts, **{"top_k": 6, "progress": False, **options})


def naive(parts, text, start, skip_first=1):
    """Latents `[tokens that count, F]` and hidden states of one text by hookpoint, and where those tokens are."""
    model, tokenizer, saes = parts
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    offsets = encoded.pop("offset_mapping")[0].tolist()
    counted = [i for i, (a, b) in enumerate(offsets) if i >= skip_first and b > a and b > start]
    with torch.no_grad():
        states = model(**encoded, output_hidden_states=True).hidden_states
        raw = {}
        handles = [
            model.model.layers[i].register_forward_hook(lambda m, a, out, i=i: raw.__setitem__(i, out))
            for i in range(len(HOOKPOINTS))
        ]
        model(**encoded)
        for handle in handles:
            handle.remove()
    assert torch.equal(states[1], raw[0])
    by_hookpoint = {}
    for i, hookpoint in enumerate(HOOKPOINTS):
        hidden = (raw[i][0] if raw[i].ndim == 3 else raw[i])[counted]
        with torch.no_grad():
            by_hookpoint[hookpoint] = (saes[hookpoint].encode(hidden).numpy(), hidden.numpy())
    return by_hookpoint, counted


def check(reading, parts, texts, starts, **options):
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        by_hookpoint, counted = naive(parts, text, start, **options)
        assert reading.spans[row].tolist() == [counted[0], counted[-1] + 1]
        assert reading.hypotheses.lengths[row] == len(counted)
        for layer, hookpoint in enumerate(HOOKPOINTS):
            latents, hidden = by_hookpoint[hookpoint]
            pooled = latents.max(axis=0)
            np.testing.assert_allclose(reading.pooled[hookpoint][row].toarray()[0], pooled, atol=1e-5)
            order = [f for f in np.argsort(-pooled, kind="stable")[:6] if pooled[f] > 0]
            found = reading.hypotheses.features[row, layer]
            assert found[: len(order)].tolist() == order
            assert (found[len(order) :] == -1).all()
            peaks = latents[:, order].argmax(axis=0)
            assert reading.hypotheses.positions[row, layer, : len(order)].tolist() == peaks.tolist()
            if reading.hidden:
                np.testing.assert_allclose(reading.hidden["last"][hookpoint][row], hidden[-1], atol=1e-5)
                np.testing.assert_allclose(reading.hidden["mean"][hookpoint][row], hidden.mean(0), atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_answers_are_read_as_a_loop_over_their_tokens_does(parts, activation):
    parts = (*parts[:2], make_saes(activation))
    check(read(parts, batch_size=4, hidden=True), parts, TEXTS, STARTS)


def test_whole_texts_are_read_without_their_first_position(parts):
    check(read(parts, scope="text"), parts, TEXTS, [0] * len(TEXTS))
    check(read(parts, starts=None), parts, TEXTS, [0] * len(TEXTS))


def test_padding_and_batches_change_nothing(parts):
    alone = Reading.concatenate([read(parts, [text], [start]) for text, start in zip(TEXTS, STARTS, strict=True)])
    for batch_size in (1, 3, 16):
        together = read(parts, batch_size=batch_size)
        assert (together.hypotheses.features == alone.hypotheses.features).all()
        assert (together.hypotheses.positions == alone.hypotheses.positions).all()
        for hookpoint in HOOKPOINTS:
            difference = abs(together.pooled[hookpoint] - alone.pooled[hookpoint]).max()
            assert difference < 1e-5


def test_the_first_position_never_counts_even_if_the_answer_begins_there(parts):
    reading = read(parts, ["yes a b"], [0])
    assert reading.spans.tolist() == [[1, 3]]
    assert read(parts, ["yes a b"], [0], skip_first=0).spans.tolist() == [[0, 3]]


def test_the_forward_ends_at_the_last_hookpoint(parts):
    model, tokenizer, saes = parts
    seen = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: seen.append(i)) for i, layer in enumerate(model.model.layers)
    ]
    handles.append(model.model.norm.register_forward_hook(lambda *_: seen.append("norm")))
    read((model, tokenizer, {"layers.0": saes["layers.0"]}), TEXTS[:3], STARTS[:3])
    for handle in handles:
        handle.remove()
    assert seen == [0]


def test_a_model_and_autoencoders_in_training_are_read_in_evaluation_mode_and_stay_in_training(parts):
    expected = read(parts)
    parts[0].train()
    parts[2]["layers.0"].train()
    try:
        reading = read(parts)
        assert parts[0].training
        assert parts[2]["layers.0"].training
    finally:
        parts[0].eval()
        parts[2]["layers.0"].eval()
    assert (reading.hypotheses.features == expected.hypotheses.features).all()


def test_a_model_in_bfloat16_can_be_read(tiny_model, parts):
    model, tokenizer = load(tiny_model)
    reading = read((model.bfloat16(), tokenizer, parts[2]), hidden=True)
    exact = read(parts)
    assert np.isfinite(reading.hypotheses.activations).all()
    assert abs(reading.pooled["layers.1"] - exact.pooled["layers.1"]).max() < 0.2
    assert reading.hidden["last"]["layers.1"].dtype == np.float32


def test_long_texts_keep_their_end(parts):
    text = " ".join([PROMPT, *["c"] * 30, "a b yes"])
    reading = read(parts, [text], [len(text) - 7], max_length=12)
    n_tokens = len(parts[1](text).input_ids)
    assert reading.spans.tolist() == [[n_tokens - 3, n_tokens]]
    tail = parts[1].decode(parts[1](text).input_ids[-12:])
    short = read(parts, [tail], [len(tail) - 7])
    assert (short.hypotheses.features == reading.hypotheses.features).all()


def test_when_memory_runs_out_batches_are_halved(parts, monkeypatch, caplog):
    expected, whole = read(parts), type(parts[0].model).forward

    def forward(self, input_ids=None, **inputs):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("out of memory, says the test")
        return whole(self, input_ids=input_ids, **inputs)

    monkeypatch.setattr(type(parts[0].model), "forward", forward)
    with caplog.at_level(logging.WARNING):
        reading = read(parts, batch_size=9)
    assert [record.args[-1] for record in caplog.records] == [4, 2]
    assert (reading.hypotheses.features == expected.hypotheses.features).all()

    monkeypatch.setattr(type(parts[0].model), "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        read(parts)


def same(one, other):
    assert one.hookpoints == other.hookpoints
    assert (one.spans == other.spans).all()
    for name in ("features", "activations", "positions", "lengths"):
        assert (getattr(one.hypotheses, name) == getattr(other.hypotheses, name)).all()
    for hookpoint in one.hookpoints:
        assert one.pooled[hookpoint].shape == other.pooled[hookpoint].shape
        assert (one.pooled[hookpoint] != other.pooled[hookpoint]).nnz == 0
    assert one.hidden.keys() == other.hidden.keys()
    for kind in one.hidden:
        for hookpoint in one.hookpoints:
            assert (one.hidden[kind][hookpoint] == other.hidden[kind][hookpoint]).all()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_reading_comes_back_from_its_file(parts, tmp_path, hidden):
    reading = read(parts, hidden=hidden)
    reading.save(tmp_path / "new")
    same(Reading.load(tmp_path / "new"), reading)
    same(reading[[3, 1]], read(parts, [TEXTS[3], TEXTS[1]], [STARTS[3], STARTS[1]], hidden=hidden))
    assert len(reading[-1]) == 1


def test_a_killed_reading_goes_on(parts, tmp_path, monkeypatch):
    expected = read(parts, chunk_texts=2, hidden=True, batch_size=2, output_dir=tmp_path / "whole")
    forwards, whole = [], type(parts[0].model).forward

    def forward(self, **inputs):
        forwards.append(len(inputs["input_ids"]))
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return whole(self, **inputs)

    monkeypatch.setattr(type(parts[0].model), "forward", forward)
    options = {"chunk_texts": 2, "hidden": True, "batch_size": 2, "output_dir": tmp_path / "killed"}
    with pytest.raises(KeyboardInterrupt):
        read(parts, **options)
    with pytest.raises(ValueError, match="2 of 5 chunks, chunk-00002.safetensors is missing"):
        Reading.load(tmp_path / "killed")
    same(read(parts, **options), expected)
    assert sum(forwards) == len(TEXTS) + 2  # what was finished was not read again
    same(read(parts, **options), expected)
    assert sum(forwards) == len(TEXTS) + 2
    same(Reading.load(tmp_path / "killed"), expected)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()


def test_chunks_of_something_else_are_refused(parts, tmp_path):
    read(parts, output_dir=tmp_path)
    other = make_saes()
    with torch.no_grad():
        other["layers.1"].b_enc[3] += 1e-3
    for changed in ({"top_k": 5}, {"scope": "text"}, {"texts": TEXTS[::-1], "starts": STARTS[::-1]}, {"hidden": True}):
        with pytest.raises(ValueError, match="holds the reading of other texts"):
            read(parts, output_dir=tmp_path, **changed)
    with pytest.raises(ValueError, match="holds the reading of other texts"):
        read((*parts[:2], other), output_dir=tmp_path)


def test_a_damaged_file_is_named(parts, tmp_path):
    read(parts, chunk_texts=5, output_dir=tmp_path / "chunks")
    content = (tmp_path / "chunks" / "chunk-00001.safetensors").read_bytes()
    for place in (3, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "chunks" / "chunk-00001.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"chunk-00001.safetensors is damaged.*read its texts again"):
            Reading.load(tmp_path / "chunks")
    (tmp_path / "chunks" / "reading.json").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="reading.json is damaged"):
        Reading.load(tmp_path / "chunks")
    (tmp_path / "chunks" / "reading.json").write_text(json.dumps({"chunks": 2}))
    with pytest.raises(ValueError, match="is no reading of version 1"):
        Reading.load(tmp_path / "chunks")
    shutil.rmtree(tmp_path / "chunks")
    with pytest.raises(FileNotFoundError, match="has no reading"):
        Reading.load(tmp_path / "chunks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": [TEXTS[0], "  "], "starts": [0, 0]}, r"text 1 is empty: '  '"),
        ({"texts": [TEXTS[0]], "starts": [len(TEXTS[0])]}, r"the answer of text 0 is empty"),
        ({"texts": ["a b", "yes"], "starts": None}, r"text 1 has 1 tokens, and the first 1 never count"),
        ({"texts": [], "starts": []}, r"texts has 0 rows"),
        ({"scope": "prompt"}, r"scope='prompt' is not known; need one of"),
        ({"batch_size": 0}, r"batch_size=0 is no number"),
        ({"chunk_texts": 0}, r"chunk_texts=0 is no number"),
        ({"max_length": 1}, r"max_length=1 leaves no token after skip_first=1"),
    ],
)
def test_input_that_cannot_be_read_is_named(parts, options, message):
    with pytest.raises(ValueError, match=message):
        read(parts, **options)


def test_autoencoders_that_do_not_fit_are_named_before_any_forward(parts, monkeypatch):
    model, tokenizer, saes = parts
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match=r"saes\['layers.0'\] has d_in=16 and LlamaForCausalLM .* d_model=32"):
        read((model, tokenizer, make_saes(width=16)))
    with pytest.raises(ValueError, match="hookpoint='layers.7' names no module"):
        read((model, tokenizer, {"layers.7": saes["layers.0"]}))
    with pytest.raises(ValueError, match="saes is empty"):
        read((model, tokenizer, {}))


def test_modules_inside_blocks_are_read_too(parts):
    model, tokenizer, saes = parts
    reading = read((model, tokenizer, {"layers.1.mlp": saes["layers.1"]}))
    assert reading.hookpoints == ["layers.1.mlp"]
    assert reading.pooled["layers.1.mlp"].shape == (len(TEXTS), FEATURES)
