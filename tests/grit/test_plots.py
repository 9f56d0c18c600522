"""Figures of spectra, ranks and factors: what they draw is what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hf_gradtools.core.curvature import eigenbasis
from hf_gradtools.grit import GritController
from hf_gradtools.grit.plots import plot_heatmaps, plot_ranks, plot_spectra
from hf_gradtools.grit.report import rank_report
from tests.grit.test_card import grit_trainer


matplotlib = pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n"
KINDS = ["model.layers.*.mlp.down_proj", "model.layers.*.self_attn.q_proj"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The controller of a short run, and its report's file."""
    folder = tmp_path_factory.mktemp("plotted")
    trainer = grit_trainer(folder)
    trainer.train()
    return trainer.controller, folder / "grit_ranks.json"


def wide_report(depth=30):
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    row = {"base_rank": 16, "parameters": 64, "k_a": 3, "k_b": 4}
    layers = {
        f"model.layers.{i}.{kind}": {**row, "rank": 4 + i % 8, "balanced": [2.0**-j for j in range(4 + i % 8)]}
        for i in range(depth)
        for kind in kinds
    }
    return {"layers": layers, "threshold": 0.99, "parameters": 1, "base_parameters": 2, "reduction": 0.5}


def panels(figure):
    """Axes other than colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_spectra_of_a_report_are_the_balanced_ones(trained, tmp_path):
    controller, file = trained
    figure = plot_spectra(file, tmp_path / "new" / "spectra.png")
    rows = rank_report(controller)["layers"]
    assert len(panels(figure)) == len(rows) == 4
    for ax in panels(figure):
        balanced = np.array(rows[ax.get_title()]["balanced"])
        assert heights(ax) == pytest.approx(balanced / balanced.sum())
    assert (tmp_path / "new" / "spectra.png").read_bytes().startswith(PNG)
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["spectra.png"]


def test_spectra_of_a_controller_have_both_factors(trained):
    controller, _ = trained
    figure = plot_spectra(controller, layers=["*.0.*.q_proj"])
    [ax] = panels(figure)
    name = "model.layers.0.self_attn.q_proj"
    rank = controller.live_ranks[name]
    factors = {layer.name: factors for layer, factors in controller.measured_layers()}[name][:, :rank, :rank]
    values = eigenbasis(factors)[0]
    wanted = (values / values.sum(-1, keepdim=True)).flatten().tolist()
    assert (ax.get_title(), len(heights(ax))) == (name, 3 * rank)
    assert heights(ax)[rank:] == pytest.approx(wanted)


def test_spectra_of_many_layers_are_a_heatmap(tmp_path):
    report = wide_report()
    figure = plot_spectra(report, tmp_path / "wide.png")
    [ax] = panels(figure)
    image = ax.images[0].get_array()
    assert image.shape == (210, 11)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert [int(name.split(".")[2]) for name in labels] == [i for i in range(30) for _ in range(7)]
    line = labels.index("model.layers.10.mlp.up_proj")
    shares = np.array(report["layers"][labels[line]]["balanced"])
    assert np.ma.filled(image[line], np.nan)[:6] == pytest.approx(np.log10(shares / shares.sum()))
    assert np.isnan(np.ma.filled(image[line], np.nan)[6:]).all()


def test_ranks_stand_before_base_ranks_by_depth(trained, tmp_path):
    controller, file = trained
    rows = rank_report(controller)["layers"]
    figure = plot_ranks(file, tmp_path / "ranks.svg")
    assert [ax.get_title(loc="left") for ax in figure.axes] == KINDS
    for ax in figure.axes:
        names = [ax.get_title(loc="left").replace("*", str(i)) for i in range(2)]
        assert heights(ax) == [rows[name][key] for key in ("base_rank", "rank") for name in names]
        assert [line.get_ydata().tolist() for line in ax.lines] == [
            [rows[name][key] for name in names] for key in ("k_a", "k_b")
        ]
    assert "<svg" in (tmp_path / "ranks.svg").read_text()
    assert [heights(ax) for ax in plot_ranks(controller).axes] == [heights(ax) for ax in figure.axes]


def test_ranks_of_many_layers_are_a_panel_per_kind():
    report = wide_report()
    report["layers"]["lm_head"] = {"rank": 2, "base_rank": 16, "parameters": 64}  # of no depth, never measured
    figure = plot_ranks(report)
    assert len(figure.axes) == 8
    by_kind = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert heights(by_kind["lm_head"]) == [16, 2]
    queries = by_kind["model.layers.*.self_attn.q_proj"]
    assert heights(queries) == [16] * 30 + [4 + i % 8 for i in range(30)]
    assert [label.get_text() for label in queries.get_xticklabels()] == [str(i) for i in range(30)]


@pytest.mark.parametrize("show", ["eigenvectors", "factors"])
def test_heatmaps_show_both_factors(trained, show, tmp_path):
    controller, _ = trained
    figure = plot_heatmaps(controller, tmp_path / "heatmaps.png", show=show)
    assert len(panels(figure)) == 2 * 4
    assert (tmp_path / "heatmaps.png").read_bytes().startswith(PNG)
    measured = {layer.name: factors for layer, factors in controller.measured_layers()}
    for i, ax in enumerate(panels(figure)):
        name, _ = ax.get_title().split("\n")
        rank = controller.live_ranks[name]
        factor = measured[name][i % 2, :rank, :rank]
        wanted = eigenbasis(factor)[1].abs() if show == "eigenvectors" else factor
        assert np.allclose(ax.images[0].get_array(), wanted.double().numpy())


def test_wrong_choices_are_refused(trained):
    controller, _ = trained
    with pytest.raises(ValueError, match=r"layers='\*.gone' fits no layer"):
        plot_spectra(controller, layers=["*.gone"])
    with pytest.raises(ValueError, match="show='basis' is unknown. Pass one of 'eigenvectors'"):
        plot_heatmaps(controller, show="basis")
    with pytest.raises(ValueError, match="report has no layers"):
        plot_ranks({})
    with pytest.raises(ValueError, match="fewer than kfac_min_samples"):
        plot_spectra({"layers": {"fc": {"rank": 4, "base_rank": 4}}})
    fresh = GritController(controller.tuner, controller.optimizer, total_steps=10)
    with pytest.raises(ValueError, match="fewer than kfac_min_samples"):
        plot_heatmaps(fresh)


def test_without_matplotlib_the_extra_is_named(trained, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plot_spectra, plot_ranks, plot_heatmaps):
        with pytest.raises(ImportError, match=r"pip install 'hf_gradtools\[viz\]'"):
            draw(trained[0])


def test_unknown_format_leaves_no_file(trained, tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        plot_ranks(trained[0], tmp_path / "ranks.xyz")
    assert not list(Path(tmp_path).iterdir())


def test_no_global_state_of_pyplot(trained):
    before = "matplotlib.pyplot" in sys.modules
    plot_ranks(trained[0])
    assert ("matplotlib.pyplot" in sys.modules) == before
