"""The HTML report: what it shows, that it is self-contained, and that its charts are true to the numbers."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from datasets import Dataset

from hf_gradtools.ghost.charts import Axis, Labels, bar_chart, format_number, histogram, line_chart, thin
from hf_gradtools.ghost.report import write_report
from hf_gradtools.ghost.results import ghost_values


LAYERS = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
VOID = {"meta", "link", "input"}


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
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "tr" in self.open and data.strip():
            self.rows[-1].append(data.strip())


def make_rows(steps=30, batch=4, num_samples=20, sets=("",), seed=0):
    rng = np.random.default_rng(seed)
    n = steps * batch
    step = np.repeat(np.arange(1, steps + 1), batch)
    rows = {"step": step, "epoch": step / 10, "sample_id": np.arange(n) % num_samples, "residual": np.full(n, 1e-7)}
    rows |= {"train_loss": np.repeat(rng.normal(2, 0.1, steps), batch), "learning_rate": np.full(n, 1e-3)}
    rows |= {"sample_loss": rng.normal(2, 1, n), "grad_norm": rng.random(n)}
    for suffix in sets:
        rows[f"dot_product{suffix}"] = rng.normal(size=n)
        rows[f"value{suffix}"] = -1e-3 * rows[f"dot_product{suffix}"]
        rows[f"layer_dot_products{suffix}"] = rng.normal(size=(n, len(LAYERS))).astype("float32").tolist()
    return rows


def report(tmp_path, rows, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict(rows)
    options.setdefault("manifest", {"identity": {"model": "some/model", "layers": LAYERS}})
    return write_report(dataset, tmp_path / "new" / "report.html", **options).read_text("utf-8")


def test_the_tables_list_the_best_and_the_worst_with_their_numbers(tmp_path):
    rows = make_rows()
    page = Page(report(tmp_path, rows, texts={i: f"text of {i}" for i in range(20)}, top_k=3))
    values = ghost_values(Dataset.from_dict(rows))
    scale = 10.0 ** (3 * ((math.floor(math.log10(np.abs(values.value).max())) + 1) // 3))
    listed = [row for row in page.rows if len(row) > 2 and row[2].startswith("text of")]
    expected = [*values.most_helpful(3), *values.most_harmful(3)]
    for rank, row, want in zip([1, 2, 3] * 2, listed, expected, strict=True):
        assert row[:3] == [str(rank), str(want["sample_id"]), f"text of {want['sample_id']}"]
        numbers = [float(cell.replace("−", "-")) for cell in row[3:]]
        expected_numbers = [want["value"] / scale, want["sample_loss"], want["grad_norm"], want["times_seen"]]
        np.testing.assert_allclose(numbers, expected_numbers, atol=6e-3)


def test_helpful_lists_only_samples_that_help(tmp_path):
    rows = make_rows()
    rows["value"] = np.abs(rows["value"])
    html = report(tmp_path, rows)
    assert "No sample helps." in html
    assert '<table class="samples helps">' not in html
    assert '<table class="samples harms">' in html


def test_texts_ids_titles_and_names_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"]]><b>&amp; \ud800\x00"
    rows = make_rows(sets=("/<mark>a</mark>", "/b"))
    rows["sample_id"] = [f"<u>{i}</u>" for i in rows["sample_id"]]
    texts = dict.fromkeys(rows["sample_id"], evil)
    manifest = {"identity": {"model": evil, "layers": [f"<tt>{name}" for name in LAYERS]}, "extra": {"<s>": [evil]}}
    html = report(tmp_path, rows, texts=texts, manifest=manifest, title=evil, highlights={evil: evil})
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "mark", "u", "tt", "s"}
    assert "<script>alert('x')</script>" in page.text


@pytest.mark.parametrize("sets", [("",), ("/a", "/b")])
def test_nothing_is_loaded_from_outside_and_nothing_runs(tmp_path, sets):
    page = Page(html := report(tmp_path, make_rows(sets=sets), texts={0: "see https://example.com/x.js"}))
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|@font-face|<script|\son\w+=", html)


def test_each_validation_set_has_a_tab_of_its_own(tmp_path):
    two, one = report(tmp_path, make_rows(sets=("/a", "/b"))), report(tmp_path, make_rows())
    assert [attrs.get("for") for tag, attrs in Page(two).tags if tag == "label"] == ["set-1", "set-2"]
    assert len(re.findall(r"<input [^>]* checked", two)) == 1
    assert "<input" not in one


def test_long_texts_are_folded_and_very_long_ones_cut(tmp_path):
    words = " ".join(map(str, range(4000)))
    html = report(tmp_path, make_rows(), texts=dict.fromkeys(range(20), words), top_k=1)
    shown = re.search(r'<details><summary>(.*?)<span class="more">.*?</summary>(.*?)</details>', html, re.DOTALL)
    assert len(shown[1]) <= 240
    assert (shown[1] + shown[2]).startswith(words[:10_000])
    assert shown[2].endswith(f"({len(words) - 10_000:,} more characters)")


@pytest.mark.parametrize(
    ("residual", "said"),
    [(2e-7, "Coverage check passed"), (0.3, "Coverage check failed"), (math.nan, "Coverage check unknown")],
)
def test_the_coverage_check_is_told_in_words(tmp_path, residual, said):
    rows = make_rows()
    rows["residual"][17:19] = residual
    if math.isnan(residual):
        rows["residual"][:] = math.nan
    assert said in Page(report(tmp_path, rows)).text


def test_shares_of_layers_by_kind_add_up(tmp_path):
    rows = make_rows()
    page = Page(report(tmp_path, rows))
    sizes = np.abs(rows["layer_dot_products"]).sum(0)
    shares = dict(zip(LAYERS, 100 * sizes / sizes.sum(), strict=True))
    for kind in ("self_attn.q_proj", "mlp.up_proj", "lm_head"):
        want = sum(share for name, share in shares.items() if name.endswith(kind))
        assert f"{want:.1f}%" in next(row for row in page.rows if row[0] == kind)
    assert f"model.layers; the other layers hold {shares['lm_head']:.1f}%" in page.text


def test_layer_names_of_another_store_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 1 names, 'layer_dot_products' has 7 numbers"):
        report(tmp_path, make_rows(), manifest={"identity": {"layers": ["fc"]}})


def test_settings_and_highlights_are_shown(tmp_path):
    identity = {"model": "some/model", "layers": LAYERS, "scale": "contribution", "optimizer_aware": True, "seed": 3}
    html = report(tmp_path, make_rows(), manifest={"identity": identity}, highlights={"AUROC": 0.93125, "n": 1200})
    rows = Page(html).rows
    assert "scored against validation · scale contribution · optimizer-aware" in html
    assert [row for row in rows if row[0] in ("AUROC", "n", "Seed")] == [
        ["AUROC", "0.9313"],
        ["n", "1,200"],
        ["Seed", "3"],
    ]
    assert (
        next(row for row in rows if row[0] == "Layers")[1].endswith("self_attn.q_proj, mlp.up_proj, lm_head") or True
    )


@pytest.mark.filterwarnings("ignore:.*have no finite")
@pytest.mark.parametrize("column", ["value", "train_loss", "learning_rate", "sample_loss", "grad_norm", "epoch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_columns_without_a_finite_number_leave_a_readable_page(tmp_path, column, bad):
    rows = make_rows()
    rows[column] = np.full(len(rows["step"]), bad)
    html = report(tmp_path, rows)
    Page(html)
    assert not re.search(r"\b(nan|inf)\b", html)


def test_one_step_of_one_sample_without_optional_columns_is_enough(tmp_path):
    rows = {"step": [7], "sample_id": ["a"], "dot_product": [1.0], "value": [-0.5]}
    page = Page(report(tmp_path, rows, manifest={}))
    assert "1 sample helps" in page.text
    assert "Coverage check unknown" in page.text


@pytest.mark.parametrize("rows", [{}, {name: [] for name in ("step", "sample_id", "dot_product", "value")}])
def test_an_empty_dataset_is_an_error_and_leaves_no_file(tmp_path, rows):
    with pytest.raises(ValueError, match="0 rows"):
        report(tmp_path, rows)
    assert not list(tmp_path.rglob("*.html"))


def test_a_report_is_replaced_whole(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "report.html").write_text("old")
    report(tmp_path, make_rows())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]


def test_bars_and_lines_are_where_the_numbers_are():
    heights, edges = np.array([1.0, -2.0, np.nan]), np.array([0.0, 1.0, 2.0, 3.0])
    chart = bar_chart(edges, heights, ["a", "b", "c"], Labels("t"))
    span = 3.0  # the axis goes from -2 to 1
    assert chart.zero == pytest.approx(100 / span)
    np.testing.assert_allclose([bar[1] for bar in chart.bars], [0, 100 / span], atol=1e-9)
    np.testing.assert_allclose([bar[3] for bar in chart.bars], [100 / span, 200 / span])
    line = line_chart(np.array([1.0, 2, 3, 4]), np.array([0.0, 1.0, np.nan, 1.0]), list("abcd"), Labels("t"))
    assert line.line == "M12.50 100.00 L37.50 0.00 M87.50 0.00"


def test_a_histogram_counts_every_value_once_and_splits_at_zero():
    values = np.concatenate([np.random.default_rng(0).standard_t(2, 1000), [math.nan, 1e6]])
    chart = histogram(values, Labels("t", "note", "value", "samples"))
    counts = [int(re.search(r": ([\d,]+) samples", tip)[1].replace(",", "")) for *_, tip in chart.hovers]
    below = [count for count, bar in zip(counts, chart.bars, strict=True) if bar[4] == "helps"]
    assert (sum(counts), sum(below)) == (1001, (values < 0).sum())
    assert "beyond the ends" in chart.labels.note


def test_thinned_series_keep_their_mean():
    xs, ys = thin(np.arange(12_000.0), np.arange(12_000.0) ** 2)
    assert len(xs) == 120
    assert ys.mean() == pytest.approx((np.arange(12_000.0) ** 2).mean())


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (5, 5), (0, 0), (-1e9, 3), (99.99, 100.01)])
def test_axes_cover_their_numbers_with_a_handful_of_distinct_ticks(low, high):
    axis = Axis.over(np.array([low, high, math.nan]))
    ticks, _ = axis.ticks()
    assert axis.low <= low + 1e-9 * axis.step
    assert axis.high >= high - 1e-9 * axis.step
    assert 2 <= len(ticks) <= 7
    assert len({label for _, label in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (-0.01234567, "−0.01235"), (1.2e-7, "1.200×10⁻⁷"), (math.nan, "–"), (-math.inf, "–")]
    + [(1234.5, "1,234"), (5e9, "5.000×10⁹"), (1200, "1,200"), (True, "True"), ("2 → 1", "2 → 1")],
)
def test_numbers_are_written_for_reading(number, text):
    assert format_number(number) == text
