"""True and false claims for detection, from multiple-choice questions and from files of labelled claims.

Both are balanced. The true and the false answer of a question share a group, so that no split parts them; lengths are
columns of their own, so that a set in which length gives the label away shows it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_gradtools.ghosttrack.answers.alias_matching import normalize_answer
from hf_gradtools.ghosttrack.answers.questions import group_questions, question_kind
from hf_gradtools.workflow.data import load_rows


__all__ = ["join_claims", "multiple_choice_claims", "plain_claims"]

logger = logging.getLogger(__name__)

TEMPLATE = "Question: {question}\nAnswer: {answer}"
NAMES_OTHERS = re.compile(r"\b(all|none|neither|both|any) of (the|these|them)\b|^[a-e1-5] (and|or) [a-e1-5]( only)?$")


def multiple_choice_claims(
    source: str | Dataset,
    split: str | None = None,
    *,
    template: str = TEMPLATE,
    category: str | None = None,
    max_characters: int = 600,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Two claims of each question: its correct option, and a wrong one drawn at random.

    Args:
        source (`str` or `datasets.Dataset`): rows, or what `load_rows` takes, in the form of ARC (`question`,
            `choices: {"text", "label"}`, `answerKey`) or of MMLU (`question`, `choices`, `answer` as a number).
        split (`str`, *optional*): of a Hub id.
        template (`str`): with `{question}` and, at its end, `{answer}`.
        category (`str`, *optional*): of all claims; by default MMLU's `subject`, else the question word.
        max_characters (`int`, defaults to 600): longer questions with their options are left out.
        limit (`int`, *optional*): at most so many questions, drawn at random.
        seed (`int`, defaults to 0): of the draws.

    Returns:
        `datasets.Dataset`: `text`, `answer_start`, `answer`, `label` (1 = wrong), `group`, `category`, `question`,
        `answer_characters`, `answer_words`; two rows of each question, the true one first or second by chance. Left
        out, with one line in the log: questions that are too long, have no other wrong option than the correct one
        (normalised), or an option about others ("all of the above"), which is no claim by itself.

    Raises:
        ValueError: the rows have another form, or nothing is left.
    """
    if "{question}" not in template or not template.endswith("{answer}"):
        raise ValueError(f"template={template!r} needs {{question}} and, at its end, {{answer}}: {TEMPLATE!r}.")
    rows = source if isinstance(source, Dataset) else load_rows(source, split)
    random = np.random.default_rng(seed)
    questions = [_read_choices(row, number) for number, row in enumerate(rows)]
    usable = [number for number, (_, right, wrong, size) in enumerate(questions) if wrong and size <= max_characters]
    if len(usable) < len(rows):
        logger.info(f"{len(rows) - len(usable)} of {len(rows)} questions make no claims and are left out")
    if not usable:
        raise ValueError(f"none of {len(rows)} questions makes claims with {max_characters=}. Raise it.")
    if limit is not None:
        usable = sorted(random.permutation(usable)[:limit].tolist())
    groups = group_questions([questions[number][0] for number in usable])
    claims = []
    for number, group in zip(usable, groups, strict=True):
        question, right, wrong, _ = questions[number]
        kind = category or rows[number].get("subject") or question_kind(question)
        pair = [(right, 0), (wrong[random.integers(len(wrong))], 1)]
        for answer, label in pair if random.random() < 0.5 else pair[::-1]:
            claims.append(_claim(template.replace("{question}", question), answer, label, group, kind, question))
    return Dataset.from_list(claims)


def plain_claims(
    source: str | Dataset,
    split: str | None = None,
    *,
    claim_column: str,
    label_column: str,
    true_values: Collection[Any],
    group_column: str | None = None,
    category_column: str | None = None,
    template: str = "{answer}",
    balanced: bool = True,
    seed: int = 0,
) -> Dataset:
    """Claims as they are written, with the labels they have.

    Args:
        source (`str` or `datasets.Dataset`): rows, or what `load_rows` takes.
        split (`str`, *optional*): of a Hub id.
        claim_column (`str`): the claims.
        label_column (`str`): their labels.
        true_values (`Collection`): the labels that mean true, such as `("true",)` or `(1,)`; all others mean false.
        group_column (`str`, *optional*): claims that no split may part, such as those about one topic; by default
            equal claims.
        category_column (`str`, *optional*): kinds of claims, `"claim"` by default.
        template (`str`): ends with `{answer}`, the claim.
        balanced (`bool`, defaults to `True`): drop claims of the larger class at random.
        seed (`int`, defaults to 0): of that draw.

    Returns:
        `datasets.Dataset`: see [`multiple_choice_claims`]; `question` is empty.

    Raises:
        ValueError: a column is missing, a claim is empty, or all labels mean the same.
    """
    if not template.endswith("{answer}"):
        raise ValueError(f"template={template!r} needs {{answer}} at its end, such as 'Claim: {{answer}}'.")
    rows = source if isinstance(source, Dataset) else load_rows(source, split)
    for name in filter(None, (claim_column, label_column, group_column, category_column)):
        if name not in rows.column_names:
            raise ValueError(
                f"claims have no column {name!r}; they have {', '.join(rows.column_names)}. Pass another."
            )
    texts = rows[claim_column][:]
    if empty := [number for number, text in enumerate(texts) if not (text and text.strip())]:
        raise ValueError(f"claim {empty[0]} is empty: {texts[empty[0]]!r}. Leave the row out.")
    labels = np.array([0 if value in true_values else 1 for value in rows[label_column]])
    if labels.min() == labels.max():
        seen = sorted({str(value) for value in rows[label_column]})[:5]
        raise ValueError(
            f"all {len(labels)} claims are {'false' if labels[0] else 'true'} by true_values={true_values!r}; column "
            f"{label_column!r} holds {', '.join(seen)}. Pass the values that mean true."
        )
    groups = _numbered(rows[group_column]) if group_column else group_questions(texts)
    kinds = rows[category_column][:] if category_column else ["claim"] * len(rows)
    claims = [
        _claim(template, text.strip(), int(label), group, str(kind), "")
        for text, label, group, kind in zip(texts, labels, groups, kinds, strict=True)
    ]
    return Dataset.from_list(claims).select(_balanced(labels, seed) if balanced else np.arange(len(labels)))


def join_claims(parts: Sequence[Dataset]) -> Dataset:
    """Several detection data sets as one, with groups that stay apart."""
    shifted, offset = [], 0
    for part in parts:
        groups = np.asarray(part["group"][:]) + offset
        offset = int(groups.max()) + 1
        shifted.append(part.remove_columns("group").add_column("group", groups))
    return concatenate_datasets(shifted)


def _claim(template: str, answer: str, label: int, group: int, category: str, question: str) -> dict[str, Any]:
    start = len(template) - len("{answer}")
    return {
        "text": template[:start] + answer,
        "answer_start": start,
        "answer": answer,
        "label": label,
        "group": group,
        "category": category,
        "question": question,
        "answer_characters": len(answer),
        "answer_words": len(answer.split()),
    }


def _read_choices(row: Mapping[str, Any], number: int) -> tuple[str, str, list[str], int]:
    """Question, correct option, wrong options that may be drawn (none if the question is of no use), characters."""
    try:
        choices = row["choices"]
        if isinstance(choices, Mapping):
            options, correct = list(choices["text"]), list(choices["label"]).index(row["answerKey"])
        else:
            options, correct = list(choices), int(row["answer"])
        question = row["question"].strip()
        options = [option.strip() for option in options]
        right = options[correct]
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"question {number} is no multiple choice that is known here ({error!r}): {str(dict(row))[:120]}. "
            "Pass rows with question, choices and answerKey as in ARC, or with answer, a number, as in MMLU."
        ) from error
    wrong = [option for option in options if option and normalize_answer(option) != normalize_answer(right)]
    if not right or not question or any(NAMES_OTHERS.search(option.lower().rstrip(".")) for option in options):
        wrong = []
    return question, right, wrong, len(question) + max(map(len, options), default=0)


def _numbered(values: Sequence[Any]) -> list[int]:
    first: dict[Any, int] = {}
    return [first.setdefault(value, row) for row, value in enumerate(values)]


def _balanced(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows of as many true as false claims, in order."""
    random = np.random.default_rng(seed)
    count = np.bincount(labels, minlength=2).min()
    return np.sort(np.concatenate([random.permutation(np.flatnonzero(labels == value))[:count] for value in (0, 1)]))
