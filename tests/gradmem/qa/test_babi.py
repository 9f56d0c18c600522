"""Stories of bAbI as rows."""

import pytest

from hf_gradtools.gradmem.qa import load_babi


STORIES = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 What is John carrying?\tapple,milk\t2 4
1 Sandra is here.
2 Where is Sandra?\there\t1
"""


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "qa.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


def test_each_question_has_the_sentences_before_it(write):
    first = "Mary moved to the bathroom. John went to the hallway."
    assert load_babi(write(STORIES)).to_list() == [
        {"context": first, "query": "Question: Where is Mary?\nAnswer:", "target": " bathroom"},
        {
            "context": f"{first} Daniel went back to the hallway.",
            "query": "Question: What is John carrying?\nAnswer:",
            "target": " apple,milk",
        },
        {"context": "Sandra is here.", "query": "Question: Where is Sandra?\nAnswer:", "target": " here"},
    ]
    assert load_babi(write(STORIES), template="{question} {it}")[2]["query"] == "Where is Sandra? {it}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 Mary is here.\n3 Where?\there\t1\n", "line 2: .* does not follow line number 1"),
        ("2 Mary is here.\n", "line 1: .* does not follow line number 0"),
        ("Mary is here.\n", "line 1: .* does not follow"),
        ("1 Where is Mary?\there\t1\n", "line 1: the question 'Where is Mary[?]' needs sentences"),
        ("1 Mary is here.\n2 Where?\t\t1\n", "line 2: the question 'Where[?]' needs .* an answer"),
        ("1 Mary is here.\n", "has no questions"),
        ("", "has no questions"),
    ],
)
def test_files_that_are_no_stories_are_refused(text, message, write):
    with pytest.raises(ValueError, match=message):
        load_babi(write(text))


def test_what_is_missing_is_told(write, tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        load_babi(tmp_path)
    with pytest.raises(ValueError, match=r"template='Q:' has no {question}"):
        load_babi(write(STORIES), template="Q:")
