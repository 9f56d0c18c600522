"""Batches of rows with the columns "context", "query" and "target"."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


IGNORE_INDEX = -100

Row = Mapping[str, Any]
Ids = list[int]


class GradMemCollator:
    """Contexts to be written, and queries with their answers to be read; everything is padded on the right.

    `Trainer` needs `remove_unused_columns=False` to leave it the texts.

    Args:
        tokenizer: of the model, with a pad token.
        queries_per_context: how many of a row's "kv_pairs" are asked for: the row's own query, then those that come
            after it in the row, and from the first again. Row i's queries are rows i·n … i·n + n − 1 of `input_ids`.
        max_context_length: tokens kept of each context, the first ones.
        add_eos_token: whether answers end in the tokenizer's eos token; those of key-value retrieval end in `|`.

    Raises:
        ValueError: a number is out of range, the tokenizer has no such token or not the row's symbols, or a row
            has too few pairs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries_per_context: int = 1,
        max_context_length: int | None = None,
        add_eos_token: bool = False,
    ):
        for name, value in (("queries_per_context", queries_per_context), ("max_context_length", max_context_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set tokenizer.pad_token = tokenizer.eos_token.")
        if add_eos_token and tokenizer.eos_token_id is None:
            raise ValueError("add_eos_token=True, and the tokenizer has no eos token. Set tokenizer.eos_token.")
        self.tokenizer = tokenizer
        self.queries_per_context = queries_per_context
        self.max_context_length = max_context_length
        self.end = [tokenizer.eos_token_id] if add_eos_token else []

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `[B·n, Q]`, `context_ids` and `context_attention_mask` `[B, S]`."""
        contexts = self._contexts(rows)
        return {
            **self._asked(rows, [[] for _ in rows]),
            "context_ids": self._padded(contexts, self.tokenizer.pad_token_id),
            "context_attention_mask": self._padded([[1] * len(ids) for ids in contexts], 0),
        }

    def _contexts(self, rows: Sequence[Row]) -> list[Ids]:
        return [ids[: self.max_context_length] for ids in self._encode([row["context"] for row in rows])]

    def _asked(self, rows: Sequence[Row], before: Sequence[Ids]) -> dict[str, Tensor]:
        """The rows' queries, each after what comes before it, with labels on the answers alone."""
        asked = [pair for row in rows for pair in self._queries(row)]
        questions = self._encode([query for query, _ in asked])
        wholes = self._encode([query + target for query, target in asked])  # a token may depend on what is before it
        self._check_known(rows, wholes)
        ids, labels = [], []
        for i, (question, whole) in enumerate(zip(questions, wholes, strict=True)):
            begin = len(os.path.commonprefix([question, whole]))
            question, answer = [*before[i // self.queries_per_context], *whole[:begin]], [*whole[begin:], *self.end]
            ids.append(question + answer)
            labels.append([IGNORE_INDEX] * len(question) + answer)
        return {
            "input_ids": self._padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
            "labels": self._padded(labels, IGNORE_INDEX),
        }

    def _check_known(self, rows: Sequence[Row], wholes: Sequence[Ids]) -> None:
        """Symbols that share the unknown token would all be right answers."""
        unknown = self.tokenizer.unk_token_id
        for i, ids in enumerate(wholes):
            row = rows[i // self.queries_per_context]
            if unknown is not None and unknown in ids and "kv_pairs" in row:
                raise ValueError(
                    f"the tokenizer does not know all symbols of {row['kv_pairs']}. Pass the one that was saved with "
                    "the rows, or build_kv_tokenizer(vocab_size) of their task."
                )

    def _queries(self, row: Row) -> list[tuple[str, str]]:
        own = (row["query"], row["target"])
        if self.queries_per_context == 1:
            return [own]
        pairs = [pair[1:-1].partition(":") for pair in row.get("kv_pairs", [])]
        if len(pairs) < self.queries_per_context:
            raise ValueError(
                f"queries_per_context={self.queries_per_context}, and a row has {len(pairs)} kv_pairs. Ask for fewer."
            )
        asked = [(f"?!{key}:", f"{value}!|") for key, _, value in pairs]
        if own not in asked:
            raise ValueError(f"a row's kv_pairs {row['kv_pairs']} have no pair of its query and target, {own}.")
        # Beginning at the row's own pair, which is any of them, no place of the context is asked for more often.
        first = asked.index(own)
        return (asked[first:] + asked[:first])[: self.queries_per_context]

    def _encode(self, texts: list[str]) -> list[Ids]:
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    @staticmethod
    def _padded(rows: list[Ids], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


class PromptCollator(GradMemCollator):
    """The same rows with the context in the prompt, for a model without a memory; see [`GradMemCollator`]."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` `[B·n, S + Q]`."""
        return self._asked(rows, self._contexts(rows))
