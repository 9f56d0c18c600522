import re

import torch

from hf_gradtools.nanogpt.sampling.heatmap import Heatmap, plot_heatmap, top_tokens
from hf_gradtools.nanogpt.sampling.pages import write_page


def test_top_tokens_are_the_sorted_softmax():
    logits, ids = torch.randn(6, 20), torch.randint(20, (6,))
    top = top_tokens(logits, ids, 5)
    shares = torch.exp(logits.double() - logits.double().logsumexp(-1, keepdim=True))
    best, order = shares.sort(-1, descending=True)
    torch.testing.assert_close(top.probabilities, best[:, :5])
    assert torch.equal(top.ids, order[:, :5])
    torch.testing.assert_close(top.chosen_probabilities, shares[range(6), ids])
    assert top.ranks.tolist() == [(order[i] == ids[i]).nonzero().item() + 1 for i in range(6)]
    assert top_tokens(logits, ids, 99).ids.shape == (6, 20)


def test_the_page_has_every_probability_and_frames_what_was_drawn(chars, tmp_path):
    logits, ids = torch.randn(3, len(chars)) * 2, torch.tensor([5, 2, 0])
    logits[1, 2], logits[0, 5] = 10, -20  # drawn: not among the top, the first, any
    top = top_tokens(logits, ids, 4)
    heatmap = Heatmap.of(chars, top)
    assert heatmap.drawn[:2] == [None, 0]
    page = write_page("heatmap.html.j2", tmp_path / "h.html", title="t", rows=heatmap.rows(), width=4).read_text()
    found = [float(share) for share in re.findall(r'title="[^"]*: ([0-9.]+)"', page)]
    torch.testing.assert_close(torch.tensor(found), top.probabilities.flatten().float(), atol=1e-6, rtol=0)
    framed = re.findall(r'class="cell drawn"[^>]*>(\S+) ', page)
    assert framed[0] == "["
    assert len(framed) == sum(place is not None for place in heatmap.drawn)


def test_figures_hold_fifty_steps_and_take_any_label(byte_level, tmp_path):
    ids = torch.tensor(list("$x_{$ 漢\n".encode()) * 6)
    top = top_tokens(torch.randn(len(ids), 256), ids, 6)
    written = plot_heatmap(Heatmap.of(byte_level, top), tmp_path / "new" / "h.png", "$_t $x{")
    assert [path.name for path in written] == ["h.png", "h_1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_what_was_drawn_is_framed_in_the_figure(chars):
    from hf_gradtools.nanogpt.sampling.heatmap import _draw

    logits = torch.zeros(2, len(chars))
    logits[0, 7], logits[1, 8] = 3, 3
    heatmap = Heatmap.of(chars, top_tokens(logits, torch.tensor([7, 8]), 3))
    axes = _draw(heatmap, slice(0, 2), "t").axes[0]
    assert [patch.get_xy() for patch in axes.patches] == [(-0.5, -0.5), (-0.5, 0.5)]
    assert axes.images[0].get_array().tolist() == heatmap.probabilities
