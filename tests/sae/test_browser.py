import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from hf_gradtools.sae.browser import interesting_features, visible, write_browser
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.contexts import top_contexts, top_contexts_in_store
from hf_gradtools.sae.extraction import extract
from hf_gradtools.sae.hookpoints import run
from hf_gradtools.sae.logit_lens import logit_lens
from hf_gradtools.sae.metrics import evaluate
from hf_gradtools.sae.modeling_sae import SAE
from tests.sae.tiny_models import CONTEXT, WIDTH, llama, make_sequences


NAME, FEATURES, COUNT, N, BEFORE, AFTER = "layers.1", 48, 11, 4, 3, 2


class Tokenizer:
    def decode(self, ids):
        return {3: "<script>alert(1)</script>", 4: " &amp; \"'", 5: "\n", 6: "\ud800"}.get(ids[0], f" t{ids[0]}")


@pytest.fixture(scope="module")
def sae():
    return SAE(SAEConfig(WIDTH, FEATURES, k=5, hookpoint=NAME), seed=2).eval()


def collect(sae, **options):
    options = {"n": N, "before": BEFORE, "after": AFTER, "batch_size": 2, "progress": False, **options}
    return top_contexts(llama(), {NAME: sae}, make_sequences(COUNT), **options)[NAME]


@pytest.fixture(scope="module")
def contexts(sae):
    return collect(sae)


@pytest.fixture(scope="module")
def latents(sae):
    with torch.no_grad():
        return sae.encode(run(llama(), [NAME], input_ids=make_sequences(COUNT))[NAME])  # [sequences, S, F]


def brute_force(latents, feature, distinct, skip=1):
    """All (activation, sequence, position) by activation, plain loops; of each sequence the best, if distinct."""
    found = [
        (latents[s, p, feature].item(), s, p)
        for s in range(COUNT)
        for p in range(skip, CONTEXT)
        if latents[s, p, feature] > 0
    ]
    found.sort(reverse=True)
    if distinct:
        seen = set()
        found = [item for item in found if not (item[1] in seen or seen.add(item[1]))]
    return found


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_top_contexts_are_those_of_brute_force(sae, latents, distinct, batch_size):
    found = collect(sae, distinct=distinct, batch_size=batch_size)
    sequences = make_sequences(COUNT)
    for feature in range(FEATURES):
        expected = brute_force(latents, feature, distinct)[:N]
        assert found.top.counts[feature] == len(expected)
        for i, (value, sequence, position) in enumerate(expected):
            assert (found.top.sequences[feature, i], found.top.positions[feature, i]) == (sequence, position)
            assert found.top.values[feature, i] == pytest.approx(value, rel=1e-5)
            for w, at in enumerate(range(position - BEFORE, position + AFTER + 1)):
                inside = 0 <= at < CONTEXT
                assert found.top.token_ids[feature, i, w] == (sequences[sequence, at] if inside else -1)
                shown = latents[sequence, at, feature].item() if inside and at > 0 else 0
                assert found.top.activations[feature, i, w] == pytest.approx(shown, rel=1e-5)


def test_density_counts_all_tokens(contexts, latents):
    expected = (latents[:, 1:] > 0).double().mean((0, 1)).numpy()
    np.testing.assert_allclose(contexts.density, expected)


def test_samples_are_real_and_do_not_depend_on_batches(sae, contexts, latents):
    other = collect(sae, batch_size=5)
    assert np.array_equal(contexts.sampled.positions, other.sampled.positions)
    for feature in range(FEATURES):
        every = {(s, p): value for value, s, p in brute_force(latents, feature, distinct=False)}
        found = contexts.sampled
        places = list(zip(found.sequences[feature], found.positions[feature], strict=True))[: found.counts[feature]]
        assert len({s for s, _ in places}) == len(places) == min(N, len({s for s, _ in every}))
        for i, place in enumerate(places):
            assert found.values[feature, i] == pytest.approx(every[place], rel=1e-5)
    assert not np.array_equal(contexts.sampled.positions, collect(sae, seed=1).sampled.positions)


def test_samples_are_fair(latents, sae):
    feature = int((latents[:, 1:] > 0).sum((0, 1)).argmax())
    every = brute_force(latents, feature, distinct=False)
    hits = dict.fromkeys([(s, p) for _, s, p in every], 0)
    for seed in range(100):
        found = collect(sae, seed=seed, n=1, distinct=False, features=[feature], batch_size=50).sampled
        hits[found.sequences[0, 0], found.positions[0, 0]] += 1
    expected = 100 / len(every)
    assert max(hits.values()) <= expected + 6 * expected**0.5 + 2
    assert sum(map(bool, hits.values())) >= 0.7 * min(len(every), 100) * 0.63


def test_chosen_features_are_those_of_all(sae, contexts):
    found = collect(sae, features=[7, 2])
    assert found.features.tolist() == [7, 2]
    assert np.array_equal(found.top.activations, contexts.top.activations[[7, 2]])
    assert np.array_equal(found.density, contexts.density)


def test_a_store_gives_the_same(sae, contexts, tmp_path):
    store = extract(
        llama(), make_sequences(COUNT), [NAME], tmp_path, dtype="float32", rows_per_shard=30, progress=False
    )
    found = top_contexts_in_store(store, {NAME: sae}, n=N, before=BEFORE, after=AFTER, batch_size=3, progress=False)
    for kind in ("top", "sampled"):
        expected, given = getattr(contexts, kind), getattr(found[NAME], kind)
        assert np.array_equal(given.token_ids, expected.token_ids)
        np.testing.assert_allclose(given.activations, expected.activations, rtol=1e-5)


def test_logits_are_decoder_times_unembedding(sae):
    model = llama()
    found = logit_lens(model, sae, [4, 9], k=3)
    logits = sae.W_dec[[4, 9]] @ model.lm_head.weight.T
    assert found.promoted.tolist() == logits.topk(3).indices.tolist()
    assert found.suppressed.tolist() == logits.topk(3, largest=False).indices.tolist()
    np.testing.assert_allclose(found.promoted_logits, (logits.topk(3).values - logits.mean(1)[:, None]).detach(), 1e-4)


class Page(HTMLParser):
    """Texts by the id of the section that they are in; every tag and link."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.ids, self.spans = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "span" and "--a" in attrs.get("style", ""):
            self.spans.append((int(attrs["style"].split(":")[1]), attrs.get("class")))


@pytest.fixture(scope="module")
def page(sae, contexts, tmp_path_factory):
    metrics = evaluate(llama(), {NAME: sae}, make_sequences(2), progress=False)[NAME]
    path = tmp_path_factory.mktemp("page") / "deep" / "features.html"
    written = write_browser(
        path, contexts, Tokenizer(), sae=sae, model=llama(), num_features=6, title="<b>mine</b>", metrics=metrics
    )
    assert [file.name for file in path.parent.iterdir()] == [written.name]
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(page):
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert all(link.startswith("#") and link[1:] in parsed.ids for link in parsed.links)
    assert not re.search(r"https?://|url\(|@import", page)


def test_the_page_shows_the_most_interesting_features(page, contexts):
    parsed = Page(page)
    assert parsed.ids == ["top", *(f"feature-{feature}" for feature in interesting_features(contexts, 6))]


def test_everything_is_escaped(contexts, tmp_path):
    features = contexts.features.tolist()
    html = write_browser(tmp_path / "all.html", contexts, Tokenizer(), features=features, title="<b>&").read_text()
    assert "<script" not in html
    assert "<b>&<" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&amp;amp; &#34;&#39;" in html
    assert "↵" in html


def test_tokens_are_shaded_by_activation(contexts, tmp_path):
    feature = int(contexts.top.values[:, 0].argmax())
    html = write_browser(tmp_path / "one.html", contexts, Tokenizer(), features=[feature], num_examples=2).read_text()
    spans = Page(html).spans
    peaks = [shade for shade, kind in spans if kind == "peak"]
    values = contexts.top.values[feature]
    scale = np.median(values)
    assert peaks[:2] == [100, 100]
    shown = contexts.top.activations[feature, :2]
    weak = sorted(max(4, round(100 * float(value / scale))) for value in shown[(shown > 0) & (shown < scale)])
    assert sorted(shade for shade, kind in spans[: (shown > 0).sum()] if kind is None and shade < 100) == weak
    assert len(Page(html.split("<details>")[0]).spans) == (shown > 0).sum()


def test_interesting_features_are_strong_and_rare(contexts):
    every = interesting_features(contexts, FEATURES)
    assert len(every) == (contexts.top.counts > 0).sum()
    medians = [np.median(row[row > 0]) if row.any() else 0 for row in contexts.top.values]
    score = np.array(medians) * -np.log10(contexts.density.clip(1e-9))
    typical = (contexts.top.counts == N) & (contexts.density <= 0.05)
    assert every == sorted(every, key=lambda f: (not typical[f], -score[f]))


def test_what_cannot_be_seen_has_a_sign():
    assert visible("a\n\tb") == "a↵⇥b"
    assert visible("\u202eabc\x00") == "�abc�"
    assert visible("") == "∅"


def test_bad_input_is_named(sae, contexts, tmp_path):
    for message, options in [
        ("n=0", {"n": 0}),
        ("before=-1", {"before": -1}),
        ("below d_sae=48", {"features": [48]}),
        ("twice", {"features": [1, 1]}),
    ]:
        with pytest.raises(ValueError, match=message):
            collect(sae, **options)
    for message, options in [
        ("go together", {"sae": sae}),
        ("features=99", {"features": [99]}),
        ("num_features=0", {"num_features": 0}),
    ]:
        with pytest.raises(ValueError, match=message):
            write_browser(tmp_path / "x.html", contexts, Tokenizer(), **options)
    narrow = SAE(SAEConfig(8, 16, k=2))
    with pytest.raises(ValueError, match="d_in=8"):
        collect(narrow)
    with pytest.raises(ValueError, match=f"takes width {WIDTH}"):
        logit_lens(llama(), narrow, [0])
    assert list(tmp_path.iterdir()) == []
