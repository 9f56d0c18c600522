"""Questions in each form that SQuAD is found in, as rows."""

import json

import pytest
from datasets import Dataset

from hf_gradtools.gradmem.qa import load_squad, squad


ROWS = [
    {"context": " Rowing is older. ", "question": " What is older? ", "answers": ["Rowing", "It"]},
    {"context": "Rowing is older.", "question": "Who?", "answers": []},
    {"context": "Teachers teach.", "question": "Who teaches?", "answers": ["Teachers"]},
]
WANTED = [
    {"context": "Rowing is older.", "query": "Question: What is older?\nAnswer:", "target": " Rowing"},
    {"context": "Teachers teach.", "query": "Question: Who teaches?\nAnswer:", "target": " Teachers"},
]


def as_on_the_hub(rows):
    return [{**row, "answers": {"text": row["answers"], "answer_start": [0] * len(row["answers"])}} for row in rows]


def nested(rows):
    paragraphs = [
        {
            "context": row["context"],
            "qas": [{"id": "1", "question": row["question"], "answers": [{"text": text} for text in row["answers"]]}],
        }
        for row in rows
    ]
    return {"version": "1.1", "data": [{"title": "a", "paragraphs": paragraphs[:1]}, {"paragraphs": paragraphs[1:]}]}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["rows", "hub", "nested.json", "lines.jsonl", "lines.json"])
def test_every_form_has_the_same_rows(form, tmp_path, monkeypatch):
    told, source = [], tmp_path / form
    monkeypatch.setattr(squad.logger, "warning", told.append)
    if form in ("rows", "hub"):
        source = Dataset.from_list(ROWS if form == "rows" else as_on_the_hub(ROWS))
    elif form == "nested.json":
        source.write_text(json.dumps(nested(ROWS)))
    else:
        source.write_text("\n".join(map(json.dumps, ROWS)))
    assert load_squad(source).to_list() == WANTED
    assert told == ["1 of 3 questions have no answer and are left out"]


def test_what_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ValueError, match="rows without answers: they have context, question"):
        load_squad(Dataset.from_list(ROWS).remove_columns("answers"))
    with pytest.raises(ValueError, match="none of 1 questions has an answer"):
        load_squad(Dataset.from_list(ROWS).select([1]))
    with pytest.raises(ValueError, match="there is no file"):
        load_squad(tmp_path / "nothing.json")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"data": [{"paragraphs": [{"context": "a"}]}]}))
    with pytest.raises(ValueError, match="is not nested as SQuAD is"):
        load_squad(broken)
