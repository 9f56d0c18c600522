"""The dashboard: that it is self-contained and escapes what it shows, and that its charts are true to the numbers."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score

from hf_gradtools.ghosttrack.report.charts import format_number, interval_plot, roc_curve, roc_plot, score_histogram
from hf_gradtools.ghosttrack.report.dashboard import plot_tracks, write_dashboard


ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&"
VOID = {"meta", "link", "input", "img"}
TRACKS = [
    [(0, 7, 4.0, 1), (1, 9, 1.0, 1), (2, 3, 0.25, 2)],
    [(1, 5, 2.0, 0)],
    [(2, 8, 0.5, 3), (3, 8, 0.5, 3)],
]


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags with their attributes, table rows and all text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def dashboard(tmp_path, **changes):
    labels = np.array([0, 0, 1, 1])
    arguments = {
        "title": "Found?",
        "results": [
            {"name": "latents", "auroc": 0.848, "low": 0.83, "high": 0.864, "accuracy": 0.7, "highlight": True},
            {"name": "length", "auroc": 0.44, "low": 0.41, "high": 0.47, "accuracy": float("nan")},
        ],
        "scores": {"latents": (labels, [0.1, 0.4, 0.35, 0.8])},
        "categories": [{"name": "law", "auroc": 0.7, "n": 1200}],
        "ablations": [
            {"name": "shuffled", "auroc": 0.6, "difference": 0.01, "difference_low": -0.01, "difference_high": 0.02}
        ],
        "cases": [
            {
                "text": "Q: why? A: so",
                "answer": "so",
                "answer_start": 11,
                "label": 1,
                "probability": 0.9,
                "tracks": TRACKS,
            }
        ],
        "config": {"sae": {"k": 32, "layers": [0, 6]}, "seed": None},
        "figures": {"texts": 1634},
        "notes": ["Nothing else holds."],
    }
    path = write_dashboard(tmp_path / "new" / "dashboard.html", **(arguments | changes))
    return path.read_text(encoding="utf-8")


def elements(chart, tag, cls=None):
    """Elements of an SVG, which must be XML that stands alone."""
    root = ElementTree.fromstring(str(chart))
    found = root.iter("{http://www.w3.org/2000/svg}" + tag)
    return [element for element in found if cls is None or element.get("class") == cls]


def test_the_page_says_what_it_is_given(tmp_path):
    page = Page(dashboard(tmp_path))
    for said in ("Found?", "1,634", "Nothing else holds.", "Case studies", "detector is right", "90 %"):
        assert said in page.text
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert ["method", "AUROC", "accuracy"] in rows
    assert ["latents", "0.848 [0.830, 0.864]", "0.700"] in rows
    assert ["length", "0.440 [0.410, 0.470]", "–"] in rows
    assert ["law", "0.700", "1,200"] in rows
    assert ["shuffled", "0.600", "+0.010 [−0.010, +0.020] includes 0"] in rows
    assert ["sae.layers", "0, 6"] in rows
    assert ["seed", "–"] in rows
    assert "<mark>so</mark>" in dashboard(tmp_path)


def test_the_page_needs_nothing_else(tmp_path):
    html = dashboard(tmp_path)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.tags)
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in html
    assert "@import" not in html


def test_everything_is_escaped(tmp_path):
    row = {"name": ATTACK, "auroc": 0.5, "low": 0.4, "high": 0.6, "note": ATTACK, ATTACK: ATTACK}
    case = {"text": ATTACK, "answer": ATTACK, "label": 0, "probability": 0.9, "tracks": TRACKS, "category": ATTACK}
    html = dashboard(
        tmp_path,
        title=ATTACK,
        subtitle=ATTACK,
        notes=[ATTACK],
        figures={ATTACK: ATTACK},
        results=[row, row],
        categories=[row],
        ablations=[row, row],
        scores={ATTACK: ([0, 1], [0.1, 0.2])},
        cases=[{**case, "note": ATTACK}, {**case, "answer_start": 3}],
        config={ATTACK: ATTACK},
    )
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "detector is wrong" in page.text


def test_a_page_of_results_alone(tmp_path):
    page = Page(
        dashboard(tmp_path, scores=None, categories=[], ablations=[], cases=[], config=None, figures=None, notes=[])
    )
    assert not any(
        part in page.text for part in ("ROC curves", "By category", "Ablations", "Case studies", "Settings")
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.01, 0.02, "better"), (-0.02, -0.01, "worse"), (0.0, 0.02, "includes 0")]
)
def test_a_difference_counts_when_its_interval_leaves_out_zero(tmp_path, low, high, verdict):
    row = {"name": "a", "auroc": 0.6, "difference": 0.01, "difference_low": low, "difference_high": high}
    assert verdict in next(row for row in Page(dashboard(tmp_path, ablations=[row])).rows if row[0].strip() == "a")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": []}, "results has 0 rows"),
        ({"results": [{"name": "a"}]}, "results[0] has no 'auroc', only name; need name, auroc."),
        ({"ablations": [{}]}, "ablations[0] has no 'name', only nothing"),
        ({"cases": [{"text": "a"}]}, "cases[0] has no 'answer', only text"),
        ({"scores": {"a": ([0, 1], [0.5])}}, "scores['a'] has labels (2,) and scores (1,)"),
        ({"scores": {"a": ([1, 1], [0.5, 0.6])}}, "scores['a'] has labels [1]; need both 0 and 1"),
        ({"scores": {"a": ([0, 1], [0.5, math.nan])}}, "scores['a'] has 1 scores that are not finite"),
        (
            {"cases": [{"text": "a", "answer": "b", "label": 0, "probability": 1.5, "tracks": []}]},
            "cases[0] has probability=1.5 and label=0",
        ),
    ],
)
def test_bad_input_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dashboard(tmp_path, **changes)
    assert not list(tmp_path.rglob("*.html"))


def test_tracks_have_a_lane_each_with_birth_death_and_width():
    chart = plot_tracks(TRACKS)
    births, deaths = elements(chart, "circle", "birth"), elements(chart, "path", "death")
    assert len(births) == 3
    assert len(deaths) == 2  # the third reaches the last layer
    segments = [line for line in elements(chart, "line") if "stroke-opacity" in line.get("style")]
    widths = [float(re.search(r"stroke-width:([\d.]+)", line.get("style"))[1]) for line in segments]
    assert len(widths) == 3
    expected = [1.5 + 8.5 * math.sqrt(mean / 4.0) for mean in (2.5, 0.625, 0.5)]
    assert widths == pytest.approx(expected, abs=0.01)
    titles = [title.text for title in elements(chart, "title")]
    assert "layer 0 · feature 7 · activation 4.000 · token 1" in titles
    assert len(titles) == 6
    assert "3 tracks" in "".join(text.text for text in elements(chart, "text"))


def test_layers_stand_where_they_belong():
    chart = plot_tracks([[(0, 1, 1.0, 0), (6, 2, 1.0, 0)]], layers=[0, 6, 11])
    segment = next(line for line in elements(chart, "line") if "stroke-opacity" in line.get("style"))
    places = {text.text: float(text.get("x")) for text in elements(chart, "text")}
    assert (float(segment.get("x1")), float(segment.get("x2"))) == (places["0"], places["6"])
    assert places["6"] - places["0"] == pytest.approx(places["11"] - places["6"], abs=0.11)
    assert len(elements(chart, "path", "death")) == 1


def test_the_strongest_tracks_are_drawn_and_counted():
    tracks = [[(0, feature, float(feature), 0), (1, feature, float(feature), 0)] for feature in range(40)]
    labels = [text.text for text in elements(plot_tracks(tracks, max_tracks=3), "text")]
    assert [label for label in labels if "@ 0" in label] == ["39 @ 0", "38 @ 0", "37 @ 0"]
    assert any(label.startswith("3 of 40 tracks") for label in labels)


@pytest.mark.parametrize("tracks", [[], [[(3, 1, 0.0, 0)]], [[(0, 1, -1.0, 0), (1, 1, 0.0, 0)]]])
def test_odd_tracks_are_drawn(tracks):
    chart = plot_tracks(tracks)
    assert "nan" not in chart
    assert len(elements(chart, "circle", "birth")) == len(tracks)


@pytest.mark.parametrize(
    ("tracks", "options", "message"),
    [
        ([[]], {}, "tracks[0] has no points"),
        ([[(1, 0, 1.0, 0), (1, 0, 1.0, 0)]], {}, "tracks[0] goes through layers [1, 1]; need ascending ones."),
        ([[(1, 0, 1.0, 0)]], {"layers": [0]}, "tracks[0] goes through layers [1], which are not all in layers=[0]"),
        ([[(1, 0, math.nan, 0)]], {}, "tracks[0] has an activation that is not finite"),
        ([], {"max_tracks": 0}, "max_tracks=0 draws nothing"),
    ],
)
def test_bad_tracks_are_named(tracks, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot_tracks(tracks, **options)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=40))
def test_the_area_under_the_curve_is_sklearns(pairs):
    labels = np.array([0, 1, *(label for label, _ in pairs)])
    scores = np.array([2, 3, *(score for _, score in pairs)], dtype=np.float64)
    false_rates, true_rates = roc_curve(labels, scores)
    assert auc(false_rates, true_rates) == pytest.approx(roc_auc_score(labels, scores))
    assert (false_rates[0], true_rates[0], false_rates[-1], true_rates[-1]) == (0, 0, 1, 1)


def test_whiskers_end_where_the_axis_says():
    chart = interval_plot([("a", 0.6, 0.5, 0.7, True), ("b", math.nan, math.nan, math.nan, False)])
    ticks = {
        text.text: float(text.get("x")) for text in elements(chart, "text") if text.get("text-anchor") == "middle"
    }
    dot = float(elements(chart, "circle")[0].get("cx"))
    whisker = next(line for line in elements(chart, "line") if "stroke-width:2" in line.get("style"))
    assert len(elements(chart, "circle")) == 1
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == (ticks["0.50"], ticks["0.70"])
    assert dot == pytest.approx((ticks["0.50"] + ticks["0.70"]) / 2, abs=0.1)
    assert "nan" not in chart


@pytest.mark.parametrize("chance", [None, 0.5])
def test_estimates_without_numbers_still_make_a_chart(chance):
    assert len(elements(interval_plot([("a", math.nan, math.nan, math.nan, False)], chance=chance), "circle")) == 0


def test_histogram_areas_are_shares_of_each_label():
    labels, scores = np.array([0, 0, 0, 1]), np.array([0.1, 0.1, 0.9, 0.9])
    paths = [path.get("d") for path in elements(score_histogram(labels, scores, bins=2), "path")]
    tops = [sorted({float(y) for y in re.findall(r"[ML][\d.]+,([\d.]+)", path)}) for path in paths]
    floor, top = max(tops[0]), min(tops[1])
    assert [(floor - y) / (floor - top) for y in tops[0]] == pytest.approx([2 / 3, 1 / 3, 0], abs=0.001)


def test_long_curves_are_thinned_but_keep_their_ends():
    curve = np.linspace(0, 1, 5000)
    points = elements(roc_plot({"a": (curve, curve)}), "polyline")[0].get("points").split()
    assert len(points) <= 200
    assert (points[0], points[-1]) == ("46.0,388.0", "426.0,8.0")


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1234, "1,234"),
        (-0.0124, "−0.012"),
        (None, "–"),
        (math.nan, "–"),
        (True, "yes"),
        ("a", "a"),
        (np.float32(0.5), "0.500"),
    ],
)
def test_numbers_read_well(number, shown):
    assert format_number(number) == shown
