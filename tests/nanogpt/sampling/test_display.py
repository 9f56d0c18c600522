import html
import io
import re

import pytest
import torch
from rich.console import Console

from hf_gradtools.nanogpt.sampling.colors import intensity_to_rgb, token_intensities
from hf_gradtools.nanogpt.sampling.display import Piece, colored_pieces, print_text, rich_text, top_k_table
from hf_gradtools.nanogpt.sampling.generation import Sample
from hf_gradtools.nanogpt.sampling.pages import write_page


BRACKETS = "[bold]a[/] [/nothing] [red on blue]b[/red on blue] [link=x] \\[ [[ ]] :smile: a\tb   \n\n  <b>&amp;"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def make_sample(vocabulary, prompt, ids):
    logits = torch.randn(len(ids), vocabulary) * 3
    return Sample(list(prompt), list(ids), logits, logits / 0.5)


def printed(text, color_system="truecolor"):
    file = io.StringIO()
    print_text(Console(file=file, force_terminal=True, color_system=color_system, width=20), text)
    return file.getvalue()


@pytest.mark.parametrize("color_system", ["truecolor", "standard", None])
def test_brackets_survive_the_terminal(byte_level, color_system):
    ids = list(BRACKETS.encode())
    pieces = colored_pieces(byte_level, make_sample(256, ids[:5], ids[5:]), "softmax")
    assert "".join(piece.text for piece in pieces) == BRACKETS
    assert ANSI.sub("", printed(rich_text(pieces), color_system)) == BRACKETS + "\n"


def test_brackets_survive_the_page(byte_level, tmp_path):
    ids = list(BRACKETS.encode())
    pieces = colored_pieces(byte_level, make_sample(256, ids[:5], ids[5:]), "rank")
    shown = {"title": "[t]", "scale": "s", "pieces": pieces}
    page = write_page("samples.html.j2", tmp_path / "new" / "page.html", title="<t>", samples=[shown]).read_text()
    body = re.search(r"<pre>\n(.*)</pre>", page, re.DOTALL)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)) == BRACKETS
    assert "<title>&lt;t&gt;</title>" in page
    assert not re.search(r"(src|href|url\()", page)  # nothing from elsewhere


def test_each_token_has_its_color(chars, tmp_path):
    sample = make_sample(len(chars), [3], [4, 5, 6])
    prompt, *pieces = colored_pieces(chars, sample, "minmax")
    assert prompt.rgb is None
    colors = [
        intensity_to_rgb(x) for x in token_intensities(sample.logits, torch.tensor(sample.ids), "minmax").tolist()
    ]
    assert [piece.rgb for piece in pieces] == colors
    codes = [re.escape(f"38;2;{r};{g};{b}m{piece.text}") for (r, g, b), piece in zip(colors, pieces, strict=True)]
    assert re.search(".*".join(codes), printed(rich_text([prompt, *pieces])))
    shown = {"title": "", "scale": "", "pieces": pieces}
    page = write_page("samples.html.j2", tmp_path / "page.html", title="", samples=[shown]).read_text()
    assert [f"rgb({r},{g},{b})" for r, g, b in colors] == re.findall(r"rgb\(\d+,\d+,\d+\)", page)


def test_a_character_of_several_tokens_has_their_mean(byte_level):
    ids = list("a€b".encode())
    sample = make_sample(256, [], ids)
    values = token_intensities(sample.logits, torch.tensor(ids), "softmax").tolist()
    pieces = colored_pieces(byte_level, sample, "softmax")
    assert [piece.text for piece in pieces] == ["a", "€", "b"]
    assert [piece.intensity for piece in pieces] == pytest.approx([values[0], sum(values[1:4]) / 3, values[4]])


def test_softmax_top_k_is_the_probability_it_was_drawn_with(chars):
    sample = make_sample(len(chars), [], [4, 5])
    expected = sample.scores.double().softmax(-1)[[0, 1], [4, 5]].tolist()
    assert [piece.intensity for piece in colored_pieces(chars, sample, "softmax_top_k")] == pytest.approx(expected)


def test_control_characters_do_no_harm():
    shown = printed(rich_text([Piece("a\x1b[2J\r\x07\x7f\tb\n")]), None)
    assert shown == "a\u241b[2J\u240d\u2407\u2421\tb\n\n"


def test_the_table_says_how_likely_each_token_was(chars):
    sample = make_sample(len(chars), [], [4])
    shares = sample.logits[0].double().softmax(-1)
    table = top_k_table(chars, sample, 3)
    cells = [str(next(iter(column.cells))) for column in table.columns]
    likelier = shares[shares > shares[4]].sum()
    assert cells[:5] == [
        "/", f"{-shares[4].log():.4f}", str(int((shares > shares[4]).sum()) + 1), f"{shares[4]:.4f}", f"{likelier:.4f}"
    ]  # fmt: skip
    assert cells[5:] == [chars.convert_ids_to_tokens(i) for i in shares.argsort(descending=True)[:3].tolist()]


def test_a_sample_without_logits_says_what_to_ask_for(chars):
    with pytest.raises(ValueError, match="keep_logits=True"):
        colored_pieces(chars, Sample([1], [2]), "softmax")
