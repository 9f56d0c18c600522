from collections import Counter

import pytest
from datasets import Dataset

from hf_gradtools.ghosttrack.answers.claims import join_claims, multiple_choice_claims, plain_claims


def arc(count=20):
    labels = ["A", "B", "C"]
    return Dataset.from_list([
        {
            "question": f"Which is number {i}?",
            "choices": {"text": [f"right {i}", f"wrong {i}", f"false {i}"], "label": labels},
            "answerKey": "A",
        }
        for i in range(count)
    ])  # fmt: skip


def mmlu(options, answer=0, question="What is it?"):
    return Dataset.from_list([{"question": question, "subject": "law", "choices": options, "answer": answer}])


def test_each_question_makes_a_true_and_a_false_claim_of_one_group():
    claims = multiple_choice_claims(arc())
    assert Counter(claims["label"]) == {0: 20, 1: 20}
    for group in set(claims["group"]):
        pair = [row for row in claims if row["group"] == group]
        assert sorted(row["label"] for row in pair) == [0, 1]
        assert len({row["question"] for row in pair}) == 1
    for row in claims:
        assert row["text"] == f"Question: {row['question']}\nAnswer: {row['answer']}"
        assert row["text"][row["answer_start"] :] == row["answer"]
        assert row["answer"].startswith("right") == (row["label"] == 0)
        assert (row["answer_characters"], row["answer_words"]) == (len(row["answer"]), 2)
    assert {row["answer"].split()[0] for row in claims} == {"right", "wrong", "false"}
    assert 0 < sum(claims["label"][::2]) < 20  # the true one comes first or second
    assert set(claims["category"]) == {"which"}


def test_claims_are_seeded_and_limited():
    first = multiple_choice_claims(arc(), seed=1)
    assert first.to_dict() == multiple_choice_claims(arc(), seed=1).to_dict()
    assert first["answer"] != multiple_choice_claims(arc(), seed=2)["answer"]
    assert len(multiple_choice_claims(arc(), limit=5)) == 10


def test_mmlu_rows_and_equal_questions():
    rows = Dataset.from_list([*mmlu(["4", "8"], 1), *mmlu(["4", "9"], 1), *mmlu(["4", "9"], 0, "Who is {answer}?")])
    claims = multiple_choice_claims(rows)
    assert {(row["answer"], row["label"]) for row in claims if row["group"] == 0} == {("8", 0), ("9", 0), ("4", 1)}
    assert len(claims) == 6
    assert set(claims["group"]) == {0, 2}
    assert set(claims["category"]) == {"law"}
    assert all(row["text"][row["answer_start"] :] == row["answer"] for row in claims)


@pytest.mark.parametrize(
    "options", [["a", "All of the above"], ["x", "B and C only"], ["The same", "same"], ["x", ""], ["x", "y" * 601]]
)
def test_options_that_make_no_claim_leave_the_question_out(options):
    rows = Dataset.from_list([*mmlu(options), *mmlu(["4", "8"], question="Why?")])
    assert set(multiple_choice_claims(rows)["question"]) == {"Why?"}
    with pytest.raises(ValueError, match="none of 1 questions makes claims"):
        multiple_choice_claims(mmlu(options))


@pytest.mark.parametrize("row", [{"question": "a?", "choices": ["a"], "answer": 1}, {"question": "a?", "answer": 1}])
def test_rows_of_another_form_are_named(row):
    with pytest.raises(ValueError, match="question 0 is no multiple choice"):
        multiple_choice_claims(Dataset.from_list([row]))


def test_templates_end_with_the_answer():
    with pytest.raises(ValueError, match="needs {question} and, at its end, {answer}"):
        multiple_choice_claims(arc(), template="{answer} {question}")
    with pytest.raises(ValueError, match="needs {answer} at its end"):
        plain_claims(arc(), claim_column="question", label_column="answerKey", true_values="A", template="Claim")


def statements():
    texts = [f" Claim number {i}. " for i in range(12)]
    return Dataset.from_dict({"text": texts, "truth": ["yes"] * 3 + ["no"] * 9, "topic": ["x", "y"] * 6})


def test_plain_claims_are_balanced_and_keep_their_labels():
    options = {"claim_column": "text", "label_column": "truth", "true_values": ("yes",)}
    claims = plain_claims(statements(), **options, template="Claim: {answer}", group_column="topic")
    assert Counter(claims["label"]) == {0: 3, 1: 3}
    assert all((int(row["answer"].split()[2].rstrip(".")) < 3) == (row["label"] == 0) for row in claims)
    assert all(row["text"] == f"Claim: {row['answer']}" and row["answer_start"] == 7 for row in claims)
    assert set(claims["group"]) == {0, 1}
    every = plain_claims(statements(), **options, balanced=False)
    assert len(every) == len(set(every["group"])) == 12
    assert every["answer_start"][0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"true_values": (1,)}, "all 12 claims are false by true_values"),
        ({"claim_column": "claim"}, "no column 'claim'"),
        ({"group_column": "id"}, "no column 'id'"),
    ],
)
def test_bad_claims_are_named(change, message):
    options = {"claim_column": "text", "label_column": "truth", "true_values": ("yes",), **change}
    with pytest.raises(ValueError, match=message):
        plain_claims(statements(), **options)


def test_empty_claims_are_named():
    rows = Dataset.from_dict({"text": ["a", " "], "truth": [1, 0]})
    with pytest.raises(ValueError, match="claim 1 is empty"):
        plain_claims(rows, claim_column="text", label_column="truth", true_values=(1,))


def test_joined_sets_keep_their_groups_apart():
    joined = join_claims([multiple_choice_claims(arc(3)), multiple_choice_claims(arc(4))])
    assert Counter(joined["group"]) == dict.fromkeys([0, 1, 2, 3, 4, 5, 6], 2)
