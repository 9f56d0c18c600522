"""Coloured samples in the terminal and as HTML: text only, never markup, so that brackets stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.segment import Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_gradtools.nanogpt.sampling.colors import intensity_to_rgb, token_intensities, token_ranks
from hf_gradtools.nanogpt.sampling.generation import Sample
from hf_gradtools.nanogpt.sampling.heatmap import top_tokens
from hf_gradtools.nanogpt.sampling.segments import segment_tokens, token_label


__all__ = ["Piece", "colored_pieces", "print_text", "rich_text", "sample_intensities", "top_k_table"]

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}  # as pictures


@dataclass(frozen=True)
class Piece:
    """Text and the colour that it is shown in.

    Args:
        text: one or a few characters.
        intensity: in [0, 1]; None for what the model did not write.
        tip: what a pointer over it is told, in HTML.
    """

    text: str
    intensity: float | None = None
    tip: str = ""

    @property
    def rgb(self) -> tuple[int, int, int] | None:
        """Its colour."""
        return None if self.intensity is None else intensity_to_rgb(self.intensity)

    @property
    def shown(self) -> str:
        """Its text; control characters but tab and newline as pictures, which do no harm in a terminal or a page."""
        return self.text.translate(CONTROLS)


def colored_pieces(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, mode: str, boundary: str | None = None
) -> list[Piece]:
    """A sample in pieces, each coloured by how sure the model was of it.

    A character of several tokens has the mean of their intensities.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): that made the prompt.
        sample (`Sample`): with its logits.
        mode (`str`): of [`token_intensities`]; or `"softmax_top_k"`, the probability that the token was drawn with.
        boundary (`str`, *optional*): put after each piece.

    Returns:
        `list[Piece]`: whose texts, joined, are the text of the sample.
    """
    values = sample_intensities(sample, mode).tolist()
    ranks = token_ranks(_logits(sample), _ids(sample)).tolist()
    start = len(sample.prompt_ids)
    pieces = []
    for segment in segment_tokens(tokenizer, sample.prompt_ids + sample.ids):
        own = [i - start for i in segment.tokens if i >= start]
        if not own:
            pieces.append(Piece(segment.text))
            continue
        intensity = sum(values[i] for i in own) / len(own)
        tip = ", ".join(f"{token_label(tokenizer, sample.ids[i])}: {values[i]:.4f}, rank {ranks[i]}" for i in own)
        pieces.append(Piece(segment.text + (boundary or ""), intensity, tip))
    return pieces


def sample_intensities(sample: Sample, mode: str) -> Tensor:
    """Of the tokens of a sample, `[T]`; see [`colored_pieces`]."""
    if mode == "softmax_top_k":
        if sample.scores is None:
            raise ValueError("the sample has no scores; draw it with keep_logits=True.")
        return token_intensities(sample.scores, _ids(sample), "softmax")
    return token_intensities(_logits(sample), _ids(sample), mode)


def rich_text(pieces: Sequence[Piece]) -> Text:
    """The pieces as styled text."""
    text = Text()
    for piece in pieces:
        style = Style() if piece.rgb is None else Style(color=f"rgb({','.join(map(str, piece.rgb))})", bold=True)
        text.append(piece.shown, style)
    return text


def print_text(console: Console, text: Text) -> None:
    """Prints text as it is: not wrapped, no tab expanded, nothing highlighted."""
    console.print(Segments(list(text.render(console, end="\n"))), soft_wrap=True, end="")


def top_k_table(tokenizer: PreTrainedTokenizerBase, sample: Sample, k: int) -> Table:
    """A row per token: cross-entropy, rank, probability, what is likelier, and the k likeliest tokens.

    Cross-entropy is in nats.
    """
    logits, ids = _logits(sample), _ids(sample)
    top = top_tokens(logits, ids, k)
    log_probabilities = logits.double().log_softmax(-1)
    table = Table("token", "nats", "rank", "p", "p likelier", *map(str, range(1, top.ids.shape[1] + 1)), box=None)
    for row, token in enumerate(sample.ids):
        own = log_probabilities[row, token]
        likelier = log_probabilities[row][log_probabilities[row] > own].exp().sum()
        table.add_row(
            Text(token_label(tokenizer, token), "bold cyan"),
            *(Text(cell) for cell in (f"{-own:.4f}", str(int(top.ranks[row])), f"{own.exp():.4f}", f"{likelier:.4f}")),
            *(
                Text(token_label(tokenizer, other), "bold cyan" if other == token else _style(probability))
                for other, probability in zip(top.ids[row].tolist(), top.probabilities[row].tolist(), strict=True)
            ),
        )
    return table


def _style(intensity: float) -> Style:
    return Style(color=f"rgb({','.join(map(str, intensity_to_rgb(min(intensity, 1.0))))})")


def _logits(sample: Sample) -> Tensor:
    if sample.logits is None:
        raise ValueError("the sample has no logits; draw it with keep_logits=True.")
    return sample.logits


def _ids(sample: Sample) -> Tensor:
    return torch.tensor(sample.ids, dtype=torch.long)
