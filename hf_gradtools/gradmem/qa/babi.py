"""Stories with questions in the format of the bAbI tasks (arXiv 1502.05698)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset

from hf_gradtools.gradmem.qa.rows import FEATURES, TEMPLATE, make_row


LINE = re.compile(r"(\d+) +(.+)")


def load_babi(path: str | Path, template: str = TEMPLATE) -> Dataset:
    """Reads a file of stories: a row for each question, with the story's sentences before it as context.

    A line is a number and a sentence, or a number, a question, its answer and what supports it, between tabs; with
    number 1 another story begins.

    Args:
        path: such as "qa1_single-supporting-fact_train.txt".
        template: of queries, with `{question}`.

    Returns:
        columns "context", "query" and "target".

    Raises:
        ValueError: there is no such file, a line of it cannot be, or it has no questions.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is no file. Pass a text file in the format of bAbI.")
    with open(path, encoding="utf-8") as file:
        rows = [make_row(*question, template) for question in _questions(file, path)]
    if not rows:
        raise ValueError(f"path={str(path)!r} has no questions. Their lines are '3 question<tab>answer<tab>1'.")
    return Dataset.from_list(rows, features=FEATURES)


def _questions(lines: Iterable[str], path: Path) -> Iterator[tuple[str, str, str]]:
    """Contexts, questions and answers."""
    story: list[str] = []
    previous = 0
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line.rstrip())
        number = 0 if match is None else int(match[1])
        if match is None or number not in (1, previous + 1):
            raise ValueError(
                f"{path}, line {place}: {line.rstrip()[:60]!r} does not follow line number {previous} of a story. "
                "Lines begin with 1, 2, 3, … in each story."
            )
        if number == 1:
            story = []
        previous = number
        text, *answer = match[2].split("\t")
        if not answer:
            story.append(text.strip())
            continue
        if not story or not answer[0].strip():
            raise ValueError(
                f"{path}, line {place}: the question {text.strip()!r} needs sentences before it, an answer."
            )
        yield " ".join(story), text, answer[0]
