"""Hypotheses against a loop over texts and features; what is saved comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses, top_hypotheses, top_hypotheses_dense


def by_loop(latents, text_offsets, k):
    """Plain Python: for each text a list of (feature, activation, position), largest first."""
    texts = []
    for start, end in zip(text_offsets[:-1], text_offsets[1:], strict=True):
        best = {}
        for position, row in enumerate(latents[start:end]):
            for feature, value in enumerate(row):
                if value > 0 and value > best.get(feature, (0.0, 0))[0]:
                    best[feature] = (value, position)
        ranked = sorted(best, key=lambda feature: (-best[feature][0], feature))[:k]
        texts.append([(feature, *best[feature]) for feature in ranked])
    return texts


def as_lists(found):
    """`LayerHypotheses` in the form of `by_loop`."""
    return [
        [(f, a, p) for f, a, p in zip(*rows, strict=True) if f >= 0]
        for rows in zip(*(array.tolist() for array in found), strict=True)
    ]


def csr(latents):
    tokens, features = np.nonzero(latents)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(tokens, minlength=len(latents)))])
    return features, latents[tokens, features], offsets


@st.composite
def texts(draw):
    """Few levels and few features, so that ties of features and of positions are common; some texts are empty."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    n_features = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    latents = rng.integers(-1, 4, (sum(lengths), n_features)).astype(np.float32)
    return latents, np.concatenate([[0], np.cumsum(lengths)]), draw(st.integers(1, 8))


@settings(max_examples=150, deadline=None)
@given(texts())
def test_hypotheses_equal_a_loop_with_ties_to_the_first(case):
    latents, offsets, k = case
    expected = by_loop(latents.tolist(), offsets, k)
    sparse, dense = top_hypotheses(*csr(latents), offsets, k), top_hypotheses_dense(latents, offsets, k)
    assert as_lists(sparse) == expected
    assert as_lists(dense) == expected
    assert sparse.features.shape == (len(offsets) - 1, k)
    assert (sparse.features[:, 1:] < 0)[sparse.features[:, :-1] < 0].all()


def test_latents_of_a_token_may_come_in_any_order():
    found = top_hypotheses([5, 2, 2, 5], [1.0, 2.0, 3.0, 1.0], [0, 2, 4], [0, 2], k=3)
    assert as_lists(found) == [[(2, 3.0, 1), (5, 1.0, 0)]]


def hypotheses(n_texts=3, k=4, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, n_texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    layers = {f"layers.{i}": top_hypotheses_dense(rng.standard_normal((offsets[-1], 7)), offsets, k) for i in range(3)}
    return Hypotheses.from_layers(layers, lengths)


def same(left, right):
    names = ("features", "activations", "positions", "lengths")
    return left.layers == right.layers and all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)


def test_parts_of_texts_put_together_are_the_whole():
    whole = hypotheses(5)
    assert same(Hypotheses.concatenate([whole[:2], whole[2], whole[3:4], whole[-1]]), whole)
    assert same(whole[np.array([4, 0])], Hypotheses.concatenate([whole[4], whole[0]]))


def test_layers_are_selected_by_name():
    whole = hypotheses()
    chosen = whole.select_layers(["layers.2", "layers.0"])
    assert np.array_equal(chosen.features, whole.features[:, [2, 0]])
    assert chosen.layers == ["layers.2", "layers.0"]
    with pytest.raises(ValueError, match=r"layers=\['layers.9'\]"):
        whole.select_layers(["layers.9"])


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "hypotheses.safetensors"
    hypotheses().save(path)
    assert same(Hypotheses.load(path), hypotheses())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("where", [0.5, 0.999])
def test_a_flipped_byte_is_named(tmp_path, where):
    path = tmp_path / "hypotheses.safetensors"
    hypotheses().save(path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hypotheses\.safetensors is damaged"):
        Hypotheses.load(path)


def test_a_cut_or_missing_file_is_named(tmp_path):
    path = tmp_path / "hypotheses.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Hypotheses.load(path)
    hypotheses().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        Hypotheses.load(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [1.0], [0, 2], [0, 1]), "offsets="),
        (([0], [1.0], [0, 1], [0, 2]), "text_offsets="),
        (([0], [1.0], [1, 1], [0, 1]), "offsets="),
        (([0, 1], [1.0], [0, 1], [0, 1]), "indices has 2"),
        (([0], [np.nan], [0, 1], [0, 1]), "NaN"),
        (([0], [1.0], [0, 1], [0, 1], 0), "k=0"),
    ],
)
def test_bad_latents_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_hypotheses(*arguments)


def test_shapes_that_do_not_belong_together_are_refused():
    whole = hypotheses()
    with pytest.raises(ValueError, match="activations has shape"):
        Hypotheses(whole.features, whole.activations[..., 1:], whole.positions, whole.lengths, whole.layers)
    with pytest.raises(ValueError, match="features has shape"):
        Hypotheses(whole.features, whole.activations, whole.positions, whole.lengths, whole.layers[:1])
    ones = np.ones((1, 1, 2))
    with pytest.raises(ValueError, match="-1 before"):
        Hypotheses(np.array([[[-1, 3]]]), ones, ones, np.array([1]), ["layers.0"])
    with pytest.raises(ValueError, match="differ in layers or K"):
        Hypotheses.concatenate([whole, hypotheses(k=2)])
