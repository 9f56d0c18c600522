"""The page of a search: what it lists, that texts are escaped, that it is self-contained."""

import re
from html.parser import HTMLParser

import pytest

from hf_gradtools.ghost.gradproj.search_report import layer_shares, write_search_report
from hf_gradtools.ghost.gradproj.stored_run import Answer, Hit


LAYERS = {"model.layers.0.mlp.up_proj": 3.0, "model.layers.1.mlp.up_proj": -1.0, "model.layers.0.attn.q_proj": 4.0}
VOID = {"meta", "link"}
EVIL = "<script>alert('x')</script>\"]]><b>&amp; {{ 7 * 7 }} \ud800\x00"


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags, text and the cells of rows."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(tmp_path, *answers, **options):
    shared = {"model": "some/model", "figures": {"queries": "1"}, "settings": {"Metric": "dot"}, **options}
    path = write_search_report(answers, tmp_path / "new" / "search.html", **shared)
    return path.read_text("utf-8")


def test_it_lists_queries_and_hits_with_scores_texts_and_shares(tmp_path):
    hits = [Hit(4, 0.25, "a near text", LAYERS), Hit("b-7", -0.5, None)]
    text = Page(page(tmp_path, Answer("what is asked", hits), Answer("and this", []))).text
    for shown in ("what is asked", "and this", "a near text", "no text stored", "0.2500", "−0.5000", "b-7"):
        assert shown in text
    assert "attn.q_proj" in text
    assert text.count("Shares of layers") == 1


def test_shares_are_signed_and_of_the_size_of_the_whole():
    (_, kinds), (_, blocks) = layer_shares(LAYERS)
    assert kinds == [("attn.q_proj", 0.5), ("mlp.up_proj", 0.25)]
    assert blocks == [("model.layers.0", 0.875), ("model.layers.1", -0.125)]


def test_many_blocks_share_bars():
    blocks = layer_shares({f"h.{i}.fc": 1.0 for i in range(30)})[1][1]
    assert [name for name, _ in blocks][:2] == ["h.0 – 2", "h.3 – 5"]
    assert sum(share for _, share in blocks) == pytest.approx(1.0)


def test_layers_without_any_gradient_have_no_shares():
    assert layer_shares({"a": 0.0})[0][1] == [("a", 0.0)]


def test_everything_is_escaped(tmp_path):
    answer = Answer(EVIL, [Hit(f"<u>{EVIL}", 1.0, EVIL * 20, {f"<tt>{EVIL}": 1.0})])
    html = page(tmp_path, answer, model=EVIL, figures={EVIL: EVIL}, settings={EVIL: EVIL}, note=EVIL)
    parsed = Page(html)
    assert not {tag for tag, _ in parsed.tags} & {"script", "u", "tt"}
    assert "<script>alert('x')</script>" in parsed.text
    assert "{{ 7 * 7 }}" in html


def test_nothing_is_loaded_from_outside_and_nothing_runs(tmp_path):
    html = page(tmp_path, Answer("q", [Hit(0, 1.0, "see https://example.com/x.js", LAYERS)]))
    links = [value for _, attrs in Page(html).tags for name, value in attrs.items() if name in ("src", "href")]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|@font-face|<script|\son\w+=", html)


def test_a_note_says_why_shares_are_missing(tmp_path):
    assert "there is no file" in Page(page(tmp_path, Answer("q", []), note="there is no file 'x'")).text
