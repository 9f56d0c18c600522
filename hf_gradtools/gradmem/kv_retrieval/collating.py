"""Batches of rows with the columns "context", "query" and "target"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


IGNORE_INDEX = -100
PAIR = re.compile(r"!(?P<key>[^:]*):(?P<value>[^!]*)!")

Row = Mapping[str, Any]


class GradMemCollator:
    """Contexts to be written, and queries with their answers to be read; everything is padded on the right.

    Args:
        tokenizer: of the model, with a pad token.
        queries_per_context: how many of the row's pairs are asked for: first the row's own query, then the others in
            their order. Row i's queries are rows i·n … i·n + n − 1 of `input_ids`.
        max_context_length: tokens kept of each context.

    Raises:
        ValueError: a number is out of range, the tokenizer cannot pad, or a row has too few pairs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries_per_context: int = 1,
        max_context_length: int | None = None,
    ):
        for name, value in (("queries_per_context", queries_per_context), ("max_context_length", max_context_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set tokenizer.pad_token = tokenizer.eos_token.")
        self.tokenizer = tokenizer
        self.queries_per_context = queries_per_context
        self.max_context_length = max_context_length

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `[B·n, Q]`, `context_ids` and `context_attention_mask` `[B, S]`."""
        batch = self._asked(([], *pair) for row in rows for pair in self._queries(row))
        contexts = [self._context(row) for row in rows]
        return {
            **batch,
            "context_ids": self._padded(contexts, self.tokenizer.pad_token_id),
            "context_attention_mask": self._padded([[1] * len(ids) for ids in contexts], 0),
        }

    def _context(self, row: Row) -> list[int]:
        return self._encode(row["context"])[: self.max_context_length]

    def _queries(self, row: Row) -> list[tuple[str, str]]:
        asked = [(row["query"], row["target"])]
        if self.queries_per_context > 1:
            pairs = [PAIR.fullmatch(pair) for pair in row["kv_pairs"]]
            others = [(f"?!{pair['key']}:", f"{pair['value']}!|") for pair in pairs if pair is not None]
            asked += [other for other in others if other[0] != row["query"]]
        if len(asked) < self.queries_per_context:
            raise ValueError(
                f"queries_per_context={self.queries_per_context}, and a row has {len(asked)} pairs. Ask for fewer."
            )
        return asked[: self.queries_per_context]

    def _asked(self, prompts: Iterator[tuple[list[int], str, str]]) -> dict[str, Tensor]:
        """Prompts `(ids before, query, answer)` with labels on the answers alone."""
        ids, labels = [], []
        for before, query, target in prompts:
            question, answer = [*before, *self._encode(query)], self._encode(target)
            ids.append(question + answer)
            labels.append([IGNORE_INDEX] * len(question) + answer)
        return {
            "input_ids": self._padded(ids, self.tokenizer.pad_token_id),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
            "labels": self._padded(labels, IGNORE_INDEX),
        }

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @staticmethod
    def _padded(rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class PromptCollator(GradMemCollator):
    """The same rows with the context in the prompt, for a model without a memory; see [`GradMemCollator`]."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` `[B·n, S + Q]`."""
        return self._asked((self._context(row), *pair) for row in rows for pair in self._queries(row))
