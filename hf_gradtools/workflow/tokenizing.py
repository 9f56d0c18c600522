"""From rows to token ids: which columns a causal LM learns from, and which tokens count in its loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value

from hf_gradtools.workflow.data import SAMPLE_ID


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = ["RowFormat", "tokenize_rows"]

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that the loss does not count
# Column names that datasets of prompts and responses go by; a context column is used where it exists.
PROMPTS = [
    (("prompt",), "completion"),
    (("prompt",), "response"),
    (("instruction", "input"), "output"),
    (("instruction", "context"), "response"),
    (("question",), "answer"),
    (("problem",), "solution"),
]
TEXTS = ("text", "content")


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row a model learns from.

    Args:
        text (`str`, *optional*): column of plain text, all of which counts in the loss.
        prompt (`tuple[str, ...]`): columns that are joined to a prompt, which does not count.
        response (`str`, *optional*): column of the response to it, which counts. A tokenizer with a chat template
            renders both as a user's and an assistant's turn, any other puts a line break between them.
        messages (`str`, *optional*): column of conversations (lists of `{"role", "content"}`), rendered by the chat
            template; the assistant's turns count.
    """

    text: str | None = None
    prompt: tuple[str, ...] = ()
    response: str | None = None
    messages: str | None = None

    @classmethod
    def detect(
        cls, columns: Sequence[str], text: str | None = None, prompt: Sequence[str] = (), response: str | None = None
    ) -> RowFormat:
        """Takes the columns that are named, or else goes by the usual names.

        Args:
            columns (`Sequence[str]`): columns that the rows have.
            text (`str`, *optional*): see [`RowFormat`].
            prompt (`Sequence[str]`): see [`RowFormat`]; goes with `response`.
            response (`str`, *optional*): see [`RowFormat`]; goes with `prompt`.

        Raises:
            ValueError: if the columns do not exist, exclude each other, or have no usual name.
        """
        if bool(prompt) != bool(response) or (text and prompt):
            raise ValueError(
                f"text_column={text!r}, prompt_column={','.join(prompt)!r}, response_column={response!r}: name either "
                "the text column, or both the prompt and the response column."
            )
        if text or prompt:
            return cls(text=text, prompt=tuple(prompt), response=response).checked(columns)
        if "messages" in columns:
            return cls(messages="messages")
        for (question, *context), answer in PROMPTS:
            if {question, answer} <= set(columns):
                return cls(prompt=(question, *(name for name in context if name in columns)), response=answer)
        usual = [*(name for name in TEXTS if name in columns), *(columns if len(columns) == 1 else [])]
        if not usual:
            raise ValueError(
                f"its columns {', '.join(columns)} do not tell what to train on. "
                "Name one by text_column=, or two by prompt_column= and response_column=."
            )
        return cls(text=usual[0])

    def checked(self, columns: Sequence[str]) -> RowFormat:
        """Itself, if the columns it reads are among `columns`; ValueError if not."""
        named = {"text_column": (self.text,), "prompt_column": self.prompt, "response_column": (self.response,)}
        for option, names in {**named, "messages": (self.messages,)}.items():
            if missing := [name for name in names if name and name not in columns]:
                raise ValueError(f"{option}={missing[0]!r} is no column of it. It has {', '.join(columns)}.")
        return self

    def __str__(self) -> str:
        if self.response:
            return f"prompts in {' + '.join(self.prompt)}, responses in {self.response}"
        return f"text in {self.text}" if self.text else f"conversations in {self.messages}"

    def turns(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The row as a conversation; plain text is a single turn without a role."""
        if self.messages:
            return [{"role": turn["role"], "content": _as_text(turn, "content")} for turn in row[self.messages] or []]
        if self.response is None:
            return [{"role": "", "content": _as_text(row, self.text or "text")}]
        prompt = "\n\n".join(part for name in self.prompt if (part := _as_text(row, name)))
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": _as_text(row, self.response)}]

    def readable(self, row: Mapping[str, Any]) -> str:
        """The row for people to read."""
        label = "{role}: {content}" if self.messages else "{content}"
        return "\n\n".join(label.format(**turn) for turn in self.turns(row))


def _as_text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, str | bool | int | float):
        return str(value)
    raise ValueError(f"column {column!r} holds {str(value)[:80]}, a {type(value).__name__}; text is needed.")


def tokenize_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, max_length: int = 512
) -> Dataset:
    """Makes the rows that `Trainer` takes. Rows with nothing to learn are left out, with one warning.

    Args:
        rows (`datasets.Dataset`): rows with a `sample_id`, see [`number_rows`].
        tokenizer (`PreTrainedTokenizerBase`): of the model; for conversations it needs a chat template.
        row_format (`RowFormat`): what of a row is learnt.
        max_length (`int`, defaults to 512): tokens kept of each row.

    Returns:
        `datasets.Dataset`: `sample_id`, `text` (for people), `input_ids` and `labels` (−100 where not learnt).

    Raises:
        ValueError: if a column is missing or holds no text, nothing is left, or a chat template is missing or unfit.
    """
    row_format.checked(rows.column_names)
    if row_format.messages and not tokenizer.chat_template:
        raise ValueError(
            f"column {row_format.messages!r} holds conversations, but the tokenizer of {tokenizer.name_or_path!r} has "
            "no chat template. Pass a chat model, or name a text column."
        )
    ints = List(Value("int64"))
    tokenized = rows.map(
        partial(_encode, tokenizer=tokenizer, row_format=row_format, max_length=max_length),
        batched=True,
        remove_columns=rows.column_names,
        features=Features(
            {SAMPLE_ID: rows.features[SAMPLE_ID], "text": Value("string"), "input_ids": ints, "labels": ints}
        ),
        desc="Tokenizing",
    )
    if lost := len(rows) - len(tokenized):
        message = f"{lost} of {len(rows)} rows have no text to learn within max_length={max_length} tokens"
        if len(tokenized) == 0:
            raise ValueError(f"{message}; nothing is left. Raise it, or name other columns.")
        logger.warning("%s; they are left out", message)
    return tokenized


def _encode(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, max_length: int
) -> dict[str, list[Any]]:
    """Tokenizes the segments of all rows of a batch in one call."""
    rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
    chat = bool(tokenizer.chat_template) and not row_format.text
    split = partial(_chat_segments, tokenizer) if chat else _plain_segments
    segments = [split(row_format.turns(row)) for row in rows]
    texts = [text for row in segments for text, _ in row]
    shape = {"add_special_tokens": False, "truncation": True, "max_length": max_length}
    pieces = iter(tokenizer(texts, **shape)["input_ids"] if texts else [])
    begin = [] if chat else [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    end = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    columns: dict[str, list[Any]] = {SAMPLE_ID: [], "text": [], "input_ids": [], "labels": []}
    for row, parts in zip(rows, segments, strict=True):
        ids, labels = list(begin), [IGNORED] * len(begin)
        for (_, learnt), piece in zip(parts, pieces, strict=False):
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        if not any(learnt and text.strip() for text, learnt in parts):
            continue
        ids, labels = (ids + end)[:max_length], (labels + end)[:max_length]
        if any(label != IGNORED for label in labels[1:]):
            cells = (row[SAMPLE_ID], row_format.readable(row), ids, labels)
            for column, cell in zip(columns.values(), cells, strict=True):
                column.append(cell)
    return columns


def _plain_segments(turns: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
    """(text, whether it is learnt) pairs: the last turn is, those before it end in a line break."""
    *before, last = (turn["content"] for turn in turns)
    return [*((f"{text}\n", False) for text in before), (last, True)]


def _chat_segments(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
    """(text, whether it is learnt) pairs: what the assistant writes is, to the end of its turn.

    A turn that the template renders otherwise once others follow (some drop old reasoning) is not.
    """
    render: Callable[..., str] = partial(tokenizer.apply_chat_template, tokenize=False)
    segments, done, whole = [], 0, render(turns) if turns else ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(turns[:i], add_generation_prompt=True) if i else "", render(turns[: i + 1])
        if whole.startswith(before) and whole.startswith(after) and after.startswith(before):
            segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
    return segments
