"""Which tokens of a text are its answer: read off the tokenizer's offsets, so that prompt and answer are one text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


__all__ = ["AnswerSpan", "encode_answers"]


class AnswerSpan(NamedTuple):
    """A text's tokens; those of its answer are `input_ids[begin:end]`."""

    input_ids: list[int]
    begin: int
    end: int


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], answer_starts: Sequence[int]
) -> list[AnswerSpan]:
    """Tokenises whole texts and finds where their answers are.

    A token that begins before the answer and ends in it belongs to the answer: it is the one whose log-probability
    says how likely the answer's first characters are. Special tokens never do.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast one; its special tokens are added.
        texts (`Sequence[str]`): prompts with their answers.
        answer_starts (`Sequence[int]`): character at which each answer begins.

    Raises:
        ValueError: a text or an answer is empty, `answer_start` is outside its text, or the tokenizer has no offsets.
    """
    if len(texts) != len(answer_starts):
        raise ValueError(f"got {len(texts)} texts and {len(answer_starts)} answer_starts; pass one for each text.")
    for row, (text, start) in enumerate(zip(texts, answer_starts, strict=True)):
        _check(row, text, start)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, by which answers are found; a fast tokenizer is "
            "needed. Load it by AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_offsets_mapping=True)
    spans = []
    for row, (ids, offsets) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        inside = [place for place, (a, b) in enumerate(offsets) if b > max(a, answer_starts[row])]
        if not inside:
            raise ValueError(
                f"no token of text {row} covers its answer {texts[row][answer_starts[row] :]!r}. Leave the row out, "
                "or pass the tokenizer of another model."
            )
        spans.append(AnswerSpan(list(ids), inside[0], inside[-1] + 1))
    return spans


def _check(row: int, text: str, start: int) -> None:
    if not text.strip():
        raise ValueError(f"text {row} is empty: {text!r}. Leave the row out.")
    if not 0 <= start <= len(text):
        raise ValueError(
            f"answer_start={start} of text {row} is outside of its {len(text)} characters. Pass its answer's place."
        )
    if not text[start:].strip():
        raise ValueError(
            f"the answer of text {row} is empty: nothing follows answer_start={start} in {text[-60:]!r}. "
            "Leave the row out."
        )
