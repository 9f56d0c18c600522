import math

import pytest
import torch

from hf_gradtools.nanogpt.sampling.colors import intensity_to_rgb, token_intensities, token_ranks


LOGITS = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.5, 0.5, -2.0, 0.0], [9.0, 0.0, 8.0, 7.0]])
IDS = torch.tensor([1, 0, 3])


def test_softmax_is_the_probability_of_each_token():
    rows = zip(LOGITS.tolist(), IDS.tolist(), strict=True)
    expected = [math.exp(row[token]) / sum(math.exp(logit) for logit in row) for row, token in rows]
    assert token_intensities(LOGITS, IDS, "softmax").tolist() == pytest.approx(expected, rel=1e-12)


def test_minmax_stretches_the_chosen_logits_over_the_text():
    assert token_intensities(LOGITS, IDS, "minmax").tolist() == pytest.approx([1.5 / 6.5, 0, 1])


def test_minmax_of_equal_logits_is_sure_of_all():
    assert token_intensities(torch.zeros(2, 3), torch.tensor([0, 2]), "minmax").tolist() == [1, 1]


def test_ranks_count_what_is_strictly_likelier():
    logits = torch.randn(50, 20).round(decimals=1)  # with ties
    ids = torch.randint(20, (50,))
    expected = [1 + sum(other > row[i] for other in row) for row, i in zip(logits.tolist(), ids.tolist(), strict=True)]
    assert token_ranks(logits, ids).tolist() == expected


def test_rank_falls_linearly_to_zero_at_the_limit():
    logits, ids = torch.arange(300.0).flip(0).expand(5, 300), torch.tensor([0, 1, 49, 99, 299])
    expected = [1, 1 - 1 / 99, 1 - 49 / 99, 0, 0]
    assert token_intensities(logits, ids, "rank").tolist() == pytest.approx(expected)


def test_rank_of_a_small_vocabulary_reaches_zero_at_its_last_token():
    assert token_intensities(LOGITS, torch.tensor([3, 2, 1]), "rank").tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", ["softmax", "minmax", "rank"])
def test_any_mode_stays_within_the_unit_interval(mode):
    values = token_intensities(torch.randn(40, 30) * 50, torch.randint(30, (40,)), mode)
    assert ((values >= 0) & (values <= 1)).all()
    assert token_intensities(torch.zeros(0, 30), torch.zeros(0, dtype=torch.long), mode).shape == (0,)


def test_colors_run_from_red_to_green():
    assert [intensity_to_rgb(x) for x in (0.0, 0.2, 1.0)] == [(255, 0, 0), (204, 51, 0), (0, 255, 0)]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="mode='hot' is unknown; pass one of softmax, minmax, rank"):
        token_intensities(LOGITS, IDS, "hot")
    with pytest.raises(ValueError, match=r"logits \[3, 4\] and ids \[2\]"):
        token_intensities(LOGITS, IDS[:2])
    with pytest.raises(ValueError, match=r"intensity=1.5 is outside"):
        intensity_to_rgb(1.5)
