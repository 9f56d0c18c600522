"""What a detection data set says of itself."""

from __future__ import annotations

import pytest
from datasets import Dataset

from hf_gradtools.ghosttrack.answers.detection_rows import DetectionRows


def rows(texts, questions, answers):
    columns = {
        "text": [f"{text}{answer}" for text, answer in zip(texts, answers, strict=True)],
        "answer_start": [len(text) for text in texts],
        "label": [number % 2 for number in range(len(texts))],
        "group": list(range(len(texts))),
    }
    return DetectionRows.load("rows", Dataset.from_dict({**columns, **({"question": questions} if questions else {})}))


def test_the_template_is_what_all_rows_have_in_common():
    shots = "Question: a?\nAnswer: b\n\n"
    found = rows([f"{shots}Question: {q}\nAnswer: " for q in ("a?", "c?")], ["a?", "c?"], ["x", "y"])
    assert found.prompt_template == shots + "Question: {question}\nAnswer: {answer}"  # not the example's question


@pytest.mark.parametrize(
    ("texts", "questions"),
    [(["Q: a ", "Question: b "], ["a", "b"]), (["Q: a ", "Q: b "], ["a", "c"]), (["Q: a ", "Q: b "], None)],
    ids=["rows differ", "question is not in the text", "no questions"],
)
def test_without_one_template_there_is_none(texts, questions):
    assert rows(texts, questions, ["x", "y"]).prompt_template is None
