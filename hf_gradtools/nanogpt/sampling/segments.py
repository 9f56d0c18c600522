"""The text of each token, though some tokens are only a part of a character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


__all__ = ["Segment", "decode", "segment_tokens", "token_label"]

REPLACEMENT = "\ufffd"  # what incomplete UTF-8 decodes to


@dataclass(frozen=True)
class Segment:
    """A piece of text and the tokens that make it: several where only together they are a character.

    Args:
        text: what they decode to, in their place.
        tokens: their places among the tokens.
    """

    text: str
    tokens: range


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens and spaces as they are."""
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def segment_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[Segment]:
    """Cuts the text of `ids` into pieces of one token each, or of as many as a character needs.

    A token may decode to something else alone than in its place, so each is given what the text grows by when it is
    added; a piece ends with the first token after which it is as it will stay.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): any.
        ids (`Sequence[int]`): tokens.

    Returns:
        `list[Segment]`: their texts, joined, are exactly `decode(tokenizer, ids)`; every token is in one of them. The
        cost is that of decoding T²/2 tokens.
    """
    text = decode(tokenizer, ids)
    segments: list[Segment] = []
    first, begin = 0, 0
    for i in range(len(ids)):
        end = _settled(decode(tokenizer, ids[: i + 1]), text, begin)
        if end > begin:
            segments.append(Segment(text[begin:end], range(first, i + 1)))
            first, begin = i + 1, end
    if first < len(ids):  # tokens that add nothing belong to the last that did
        last = segments.pop() if begin == len(text) and segments else Segment("", range(first, first))
        segments.append(Segment(last.text + text[begin:], range(last.tokens.start, len(ids))))
    return segments


def token_label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token alone, to be seen: control characters escaped, nothing but spaces as ␣, parts of characters by name."""
    text = decode(tokenizer, [token])
    if text == "" or REPLACEMENT in text:
        text = str(tokenizer.convert_ids_to_tokens(token))
    if text.strip(" ") == "":
        return "␣" * len(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _settled(beginning: str, text: str, begin: int) -> int:
    """Up to where `beginning` is as in the whole `text`, which it is up to `begin`."""
    end = begin
    while end < min(len(beginning), len(text)) and beginning[end] == text[end]:
        end += 1
    return end
