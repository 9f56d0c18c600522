"""Questions about paragraphs, answered by their words, as in SQuAD (arXiv 1606.05250)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from hf_gradtools.gradmem.qa.rows import FEATURES, TEMPLATE, make_row
from hf_gradtools.workflow.data import load_rows


logger = logging.get_logger(__name__)

NEEDED = ("context", "question", "answers")


def load_squad(source: str | Path | Dataset, split: str | None = None, template: str = TEMPLATE) -> Dataset:
    """Reads questions with their paragraphs; those without an answer are left out, with one warning.

    Args:
        source: a file in SQuAD's own nested JSON, or rows with columns "context", "question" and "answers": a
            `Dataset`, a Hub id such as "rajpurkar/squad", or a file. Answers are texts, or as on the Hub
            `{"text": texts}`; the first of them is the target.
        split: of a Hub id, such as "train[:1000]"; see `load_rows`.
        template: of queries, with `{question}`.

    Returns:
        columns "context", "query" and "target".

    Raises:
        ValueError: it cannot be read, has no such columns, or no answered questions.
    """
    rows = source if isinstance(source, Dataset) else _read(str(source), split)
    if missing := set(NEEDED) - set(rows.column_names):
        raise ValueError(
            f"rows without {', '.join(sorted(missing))}: they have {', '.join(rows.column_names)}. "
            f"Rename columns to {', '.join(NEEDED)}."
        )
    answered = rows.select_columns(list(NEEDED)).map(
        partial(_answered, template=template),
        batched=True,
        remove_columns=list(NEEDED),
        features=FEATURES,
        desc="Reading questions",
    )
    if len(answered) == 0:
        raise ValueError(f"none of {len(rows)} questions has an answer. Pass other rows.")
    if left_out := len(rows) - len(answered):
        logger.warning(f"{left_out} of {len(rows)} questions have no answer and are left out")
    return answered


def _read(source: str, split: str | None) -> Dataset:
    path = Path(source)
    if path.suffix == ".json" and path.is_file():
        with open(path, encoding="utf-8") as file:
            try:
                whole = json.load(file)
            except ValueError:  # lines of JSON, perhaps
                whole = None
        if isinstance(whole, dict) and "data" in whole:
            return Dataset.from_list(list(_unnested(whole["data"], source)))
    return load_rows(source, split)


def _unnested(articles: list[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    yield {"context": paragraph["context"], "question": asked["question"], "answers": answers}
    except (KeyError, TypeError) as error:
        raise ValueError(f"source={source!r} is not nested as SQuAD is: {error!r}. Pass rows instead.") from error


def _answered(batch: dict[str, list[Any]], template: str) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {name: [] for name in FEATURES}
    for context, question, answers in zip(*(batch[name] for name in NEEDED), strict=True):
        texts = answers["text"] if isinstance(answers, dict) else answers
        if texts:
            for name, text in make_row(context, question, texts[0], template).items():
                columns[name].append(text)
    return columns
