import math

import pytest
import torch

from hf_gradtools.nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.analysis import plot_softmax, softmax_weights
from hf_gradtools.nanogpt.components import VARIANTS


SCORES = torch.tensor([1.5, -0.5, 0.0, 3.0, -4.0], dtype=torch.float64)


def test_weights_are_those_of_the_formulas():
    weights = softmax_weights(SCORES, ["softmax", "consmax", "relumax"])
    total = sum(math.exp(score) for score in SCORES.tolist())
    expected = {
        "softmax": [math.exp(score) / total for score in SCORES.tolist()],
        "consmax": [math.exp(score - 2.5) / 100 for score in SCORES.tolist()],
        "relumax": [max(score, 0) / 256 for score in SCORES.tolist()],
    }
    assert list(weights) == list(expected)
    for name, row in expected.items():
        assert weights[name].tolist() == pytest.approx(row, rel=1e-6)


def test_all_variants_weigh_nothing_that_is_not_allowed():
    allowed = torch.tensor([True, True, False, True, True])
    weights = softmax_weights(SCORES, allowed=allowed)
    assert set(weights) == set(VARIANTS["softmax"])
    assert all(row[2] == 0 and row.isfinite().all() and row.sum() > 0 for row in weights.values())


def test_options_reach_the_variants():
    config = NanoGPTConfig(n_layer=1, consmax_initial_gamma=10.0)
    row = softmax_weights(SCORES, ["consmax"], config)["consmax"]
    torch.testing.assert_close(row, softmax_weights(SCORES, ["consmax"])["consmax"] * 10)


def test_the_figure_has_every_variant(tmp_path):
    weights = softmax_weights(SCORES)
    figure = plot_softmax(SCORES, weights, tmp_path / "softmax.png")
    absolute, relative = figure.axes
    assert [line.get_label() for line in absolute.lines] == list(weights)
    by_score = weights["softmax"][SCORES.argsort()].tolist()
    assert absolute.lines[list(weights).index("softmax")].get_ydata() == pytest.approx(by_score)
    assert all(sum(line.get_ydata()) == pytest.approx(1) for line in relative.lines)
    assert (tmp_path / "softmax.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"variants=\['hardmax'\] are unknown; choose from consmax"):
        softmax_weights(SCORES, ["hardmax"])
    with pytest.raises(ValueError, match=r"scores \[1, 5\] must be one row"):
        softmax_weights(SCORES[None])
