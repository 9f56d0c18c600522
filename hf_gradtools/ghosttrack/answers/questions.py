"""Questions with their accepted answers, out of data sets of several forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hf_gradtools.ghosttrack.answers.alias_matching import normalize_answer
from hf_gradtools.workflow.data import load_rows


__all__ = ["Questions", "group_questions", "question_kind", "read_questions"]

ANSWER_COLUMNS = ("answers", "answer", "aliases")
KINDS = ("who", "whom", "whose", "when", "where", "which", "what", "why", "how")


@dataclass(frozen=True)
class Questions:
    """Questions, each with its accepted answers, a group (equal for equal questions) and a category."""

    texts: list[str]
    answers: list[list[str]]
    groups: list[int]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def read_questions(
    source: str | Dataset,
    split: str | None = None,
    *,
    question_column: str = "question",
    answers_column: str | None = None,
    category_column: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Questions:
    """Reads questions and all answers that count as right.

    Args:
        source (`str` or `datasets.Dataset`): rows, or what `load_rows` takes: a Hub id, a file, a folder.
        split (`str`, *optional*): of a Hub id.
        question_column (`str`, defaults to `"question"`): the questions.
        answers_column (`str`, *optional*): by default the first there is of "answers", "answer", "aliases". Its
            values are a text, a list of texts, or as in TriviaQA `{"value": text, "aliases": texts}`, or as in SQuAD
            `{"text": texts}`.
        category_column (`str`, *optional*): by default a question's category is its question word, see
            [`question_kind`].
        limit (`int`, *optional*): at most so many questions.
        seed (`int`, *optional*): which ones, drawn at random; the first ones without it.

    Returns:
        `Questions`: those that have an answer.

    Raises:
        ValueError: a column is missing, its values have another form, or nothing is left.
    """
    rows = source if isinstance(source, Dataset) else load_rows(source, split)
    answers_column = answers_column or next((name for name in ANSWER_COLUMNS if name in rows.column_names), "answers")
    for name in filter(None, (question_column, answers_column, category_column)):
        if name not in rows.column_names:
            raise ValueError(
                f"the questions have no column {name!r}; they have {', '.join(rows.column_names)}. Pass "
                "question_column, answers_column or category_column."
            )
    if limit is not None:
        rows = (rows if seed is None else rows.shuffle(seed)).select(range(min(limit, len(rows))))
    texts = [text.strip() for text in rows[question_column]]
    answers = [_texts(value, answers_column) for value in rows[answers_column]]
    kinds = rows[category_column][:] if category_column else map(question_kind, texts)
    kept = [row for row in zip(texts, answers, map(str, kinds), strict=True) if row[0] and row[1]]
    if not kept:
        raise ValueError(f"none of {len(rows)} questions has an answer in column {answers_column!r}. Pass other rows.")
    texts, answers, categories = (list(column) for column in zip(*kept, strict=True))
    return Questions(texts, answers, group_questions(texts), categories)


def group_questions(texts: Sequence[str]) -> list[int]:
    """A number for each question: that of the first one that is equal when normalised."""
    first: dict[str, int] = {}
    return [first.setdefault(normalize_answer(text), row) for row, text in enumerate(texts)]


def question_kind(question: str) -> str:
    """The question word it begins with, else the first one in it, else "other"."""
    words = normalize_answer(question).split()
    return next((word for word in words if word in KINDS), "other")


def _texts(value: Any, column: str) -> list[str]:
    if isinstance(value, dict):
        parts = [value[name] for name in ("value", "aliases", "text") if value.get(name)]
        return list(dict.fromkeys(text for part in parts for text in _texts(part, column)))
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [text for text in value if text.strip()]
    if value is None:
        return []
    raise ValueError(
        f"column {column!r} holds {str(value)[:60]}; need a text, a list of texts, or a dict with 'value' and "
        "'aliases', or 'text'. Pass answers_column."
    )
