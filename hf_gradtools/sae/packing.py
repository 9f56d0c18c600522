"""Texts packed into sequences of equal length, so that every forward has the same shape and no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_gradtools.workflow.data import load_rows
from hf_gradtools.workflow.tokenizing import RowFormat


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = ["token_blocks"]

TEXTS_PER_CALL = 1000  # of the tokenizer


def token_blocks(
    texts: str | Dataset | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int = 512,
    *,
    text_column: str | None = None,
    bos: bool | None = None,
    seed: int | None = 0,
    max_tokens: int | None = None,
) -> Tensor:
    """Packs documents, shuffled, into sequences: each is followed by an eos token, and sequences cut where they end.

    Args:
        texts (`str`, `datasets.Dataset` or `Sequence[str]`): the documents; a single string is the Hub id or file of
            a dataset, see [`~hf_gradtools.workflow.data.load_rows`]. Blank ones are left out.
        tokenizer (`PreTrainedTokenizerBase`): of the model; without an eos token documents follow one another bare.
        context_length (`int`, defaults to 512): tokens of a sequence.
        text_column (`str`, *optional*): column of a dataset that holds the text; default by the usual names.
        bos (`bool`, *optional*): whether each sequence begins with the bos token, as one of its `context_length`
            tokens; default if the tokenizer puts it before texts itself.
        seed (`int`, *optional*, defaults to 0): of the order of the documents; `None` keeps theirs.
        max_tokens (`int`, *optional*): ends once so many tokens are packed, rounded down to whole sequences.

    Returns:
        `Tensor`: `[sequences, context_length]` int64. Tokens that fill no whole sequence are dropped.

    Raises:
        ValueError: if there is no text, or too little for one sequence.
    """
    begin = _begin(tokenizer, bos)
    room = context_length - len(begin)
    if room < 1:
        raise ValueError(f"context_length={context_length} leaves no room for text. Pass at least {1 + len(begin)}.")
    limit = None if max_tokens is None else max_tokens // context_length
    if limit == 0:
        raise ValueError(f"max_tokens={max_tokens} is below context_length={context_length}. Pass at least that many.")
    documents = _documents(texts, text_column, seed)
    packed: list[np.ndarray] = []
    waiting, count, num_tokens = np.empty(0, dtype=np.int64), 0, 0
    for ids in _tokenized(documents, tokenizer):
        waiting = np.concatenate([waiting, ids])
        whole = len(waiting) // room
        packed.append(waiting[: whole * room].reshape(whole, room))
        waiting, count, num_tokens = waiting[whole * room :], count + whole, num_tokens + len(ids)
        if limit is not None and count >= limit:
            break
    if count == 0:
        raise ValueError(
            f"texts have {num_tokens} tokens, which fill no sequence of context_length={context_length}. "
            "Pass more text, or a smaller context_length."
        )
    rows = np.concatenate(packed)[:limit]
    start = np.tile(np.array(begin, dtype=np.int64), (len(rows), 1))
    return torch.from_numpy(np.concatenate([start, rows], axis=1) if begin else rows)


def _begin(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> list[int]:
    token = tokenizer.bos_token_id
    if bos is None:
        bos = token is not None and token in tokenizer("")["input_ids"]
    if bos and token is None:
        raise ValueError(
            f"bos=True, but the tokenizer of {tokenizer.name_or_path!r} has no bos token. Pass bos=False."
        )
    return [token] if bos else []


def _documents(texts: str | Dataset | Sequence[str], text_column: str | None, seed: int | None) -> Iterator[str]:
    rows = load_rows(texts) if isinstance(texts, str) else texts
    order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
    if isinstance(rows, Dataset):
        if len(rows):
            row_format = RowFormat.detect(rows.column_names, text=text_column)
            yield from (text for i in order if (text := row_format.readable(rows[int(i)])).strip())
        return
    for i in order:
        text = rows[int(i)]
        if not isinstance(text, str):
            raise ValueError(f"texts[{i}] is {str(text)[:80]!r}, a {type(text).__name__}; need text. Pass strings.")
        if text.strip():
            yield text


def _tokenized(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The tokens of some documents at a time, an eos token after each."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    some = False
    while chunk := [text for _, text in zip(range(TEXTS_PER_CALL), documents, strict=False)]:
        some = True
        ids = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.array([token for document in ids for token in [*document, *end]], dtype=np.int64)
    if not some:
        raise ValueError("texts are empty: no document has any text. Pass at least one that is not blank.")
