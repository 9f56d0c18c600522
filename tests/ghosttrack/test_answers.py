import logging
import math

import pytest
import torch
from datasets import Dataset

from hf_gradtools.core.store import StoreMismatchError
from hf_gradtools.ghosttrack.answers import answering as answers_module
from hf_gradtools.ghosttrack.answers.alias_matching import (
    cluster_answers,
    match_alias,
    normalize_answer,
    semantic_entropy,
)
from hf_gradtools.ghosttrack.answers.answering import (
    DEFAULT_SHOTS,
    Shot,
    balance,
    generate_answers,
    group_by_answer,
    prompts_of,
    sample_answers,
    without_shots,
)
from hf_gradtools.ghosttrack.answers.generation import LineGenerator
from hf_gradtools.ghosttrack.answers.questions import question_kind, read_questions
from tests.ghosttrack.tiny_answers import model, tokenizer


NEW_TOKENS = 6
FEW = (Shot("which is it?", "Paris"), Shot("is it so?", "True"))


def questions(count=10):
    texts = [f"which town is number {'1' * (i % 4)}{i}?" for i in range(count)]
    return read_questions(Dataset.from_dict({"question": texts, "answer": [["Paris", "x"]] * count}))


def generate(store, **options):
    options = {"shots": FEW, "max_new_tokens": NEW_TOKENS, "batch_size": 3, **options}
    return generate_answers(model(), tokenizer(), options.pop("questions", questions()), store, **options)


def line_by_plain_generate(causal_lm, prompt):
    """Text, log-probabilities and entropies up to the newline, one prompt at a time, without any cache."""
    start = ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
    newline, logprobs, entropies = tokenizer()("\n")["input_ids"][0], [], []
    for _ in range(NEW_TOKENS):
        distribution = causal_lm(ids).logits[0, -1].log_softmax(-1)
        token = distribution.argmax()
        ids = torch.cat([ids, token[None, None]], 1)
        logprobs.append(distribution[token].item())
        entropies.append(-(distribution.exp() * distribution).sum().item())
        if token in (newline, 1):
            break
    generated = causal_lm.generate(start, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    assert torch.equal(generated[0, : ids.shape[1]], ids[0])
    ended = token.item() in (newline, 1)
    count = max(1, len(logprobs) - ended)
    text = tokenizer().decode(ids[0, start.shape[1] :], skip_special_tokens=True).split("\n")[0].rstrip()
    return text, logprobs[:count], entropies[:count], ended


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_batches_write_what_generate_writes_row_by_row(kind, share_prefix):
    prompts = [f"Question: is it True?\nAnswer: False\n\nQuestion: {'a ' * i}{i}?\nAnswer:" for i in range(12)]
    generator = LineGenerator(model(kind), tokenizer(), prompts, max_new_tokens=NEW_TOKENS, share_prefix=share_prefix)
    assert (generator.num_shared > 8) == share_prefix
    lines = [*generator([5, 0, 11, 2]), *generator([1, 3, 4, 6, 7, 8, 9, 10])]
    ended = []
    for line, row in zip(lines, [5, 0, 11, 2, 1, 3, 4, 6, 7, 8, 9, 10], strict=True):
        text, logprobs, entropies, ends = line_by_plain_generate(model(kind), prompts[row])
        assert (line.text, line.ended) == (text, ends)
        assert line.logprobs == pytest.approx(logprobs, abs=1e-5)  # generate works in float32
        assert line.entropies == pytest.approx(entropies, abs=1e-5)
        ended.append(ends)
    assert True in ended
    assert False in ended


def test_samples_are_seeded_and_leave_the_global_generator_alone():
    generator = LineGenerator(model(), tokenizer(), ["Question: a?\nAnswer:", "Question: b?\nAnswer:"])
    torch.manual_seed(3)
    first = generator([0, 0, 0, 1], seed=7)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == after
    assert first == generator([0, 0, 0, 1], seed=7)
    assert first != generator([0, 0, 0, 1], seed=8)
    assert len({line.text for line in first}) > 1


def test_rows_hold_prompt_answer_label_and_scalars(tmp_path):
    rows = generate(tmp_path / "store")
    assert {"text", "answer_start", "answer", "label", "group", "category", "question"} <= set(rows.column_names)
    for row, prompt in zip(rows, prompts_of(rows), strict=True):
        assert prompt.endswith(f"Question: {row['question']}\nAnswer:")
        assert prompt.startswith("Question: which is it?\nAnswer: Paris\n\nQuestion: is it so?\nAnswer: True\n\n")
        assert row["text"][row["answer_start"] :] == row["answer"]
        assert row["text"][row["question_start"] :].startswith("Question: which town")
        assert row["label"] == (match_alias(row["answer"], ["Paris", "x"]) == "none")
        assert row["generated_sum_logprob"] == pytest.approx(row["generated_mean_logprob"] * row["generated_tokens"])
        assert row["generated_min_logprob"] <= row["generated_mean_logprob"] < 0
        assert 0 < row["generated_mean_entropy"] <= row["generated_max_entropy"] <= math.log(len(tokenizer()))
    cut = without_shots(rows)
    assert cut["text"] == [row["text"][row["question_start"] :] for row in rows]
    assert [row["text"][row["answer_start"] :] for row in cut] == list(rows["answer"])


def test_each_question_gets_its_own_answer(tmp_path):
    rows = generate(tmp_path / "store")
    assert list(rows["question"]) == questions().texts
    alone = LineGenerator(model(), tokenizer(), prompts_of(rows), max_new_tokens=NEW_TOKENS, share_prefix=False)
    assert list(rows["answer"]) == [alone([row])[0].text.strip() for row in range(len(rows))]
    assert len(set(rows["answer"])) > 5


def test_right_answers_are_labelled_right(tmp_path):
    said = generate(tmp_path / "a")["answer"][0]
    known = questions()
    known.answers[0] = [said]
    rows = generate(tmp_path / "b", questions=known)
    assert (rows[0]["label"], rows[0]["match"]) == (0, "exact")
    assert rows["label"][1:] == generate(tmp_path / "a")["label"][1:]


@pytest.mark.parametrize("batches_before_kill", [0, 1, 3])
def test_killed_runs_go_on_and_end_equal(tmp_path, monkeypatch, batches_before_kill):
    whole = generate(tmp_path / "whole")
    calls = []

    class Killed(LineGenerator):
        def __call__(self, rows, **options):
            if len(calls) == batches_before_kill:
                raise KeyboardInterrupt
            calls.append(rows)
            return super().__call__(rows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "LineGenerator", Killed)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path / "killed")
    inner, later = LineGenerator.__call__, []
    monkeypatch.setattr(LineGenerator, "__call__", lambda self, rows: later.append(rows) or inner(self, rows))
    assert generate(tmp_path / "killed").to_dict() == whole.to_dict()
    assert len(later) == 4 - batches_before_kill
    assert sorted(sum(calls + later, [])) == list(range(10))


def test_done_batches_are_not_run_again(tmp_path, monkeypatch):
    first = generate(tmp_path / "store")
    monkeypatch.setattr(LineGenerator, "__call__", None)
    assert generate(tmp_path / "store").to_dict() == first.to_dict()


def test_a_store_of_other_questions_or_settings_is_refused(tmp_path):
    generate(tmp_path / "store")
    with pytest.raises(StoreMismatchError, match="max_new_tokens"):
        generate(tmp_path / "store", max_new_tokens=NEW_TOKENS + 1)
    with pytest.raises(StoreMismatchError, match="prompts"):
        generate(tmp_path / "store", questions=questions(9))


def test_samples_resume_and_have_an_entropy(tmp_path, monkeypatch):
    rows = generate(tmp_path / "answers")
    options = {"num_samples": 3, "max_new_tokens": NEW_TOKENS, "batch_size": 2}
    whole = sample_answers(model(), tokenizer(), rows, tmp_path / "whole", **options)
    inner, calls = LineGenerator.__call__, []

    def killed(self, rows, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        return inner(self, rows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LineGenerator, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            sample_answers(model(), tokenizer(), rows, tmp_path / "killed", **options)
    resumed = sample_answers(model(), tokenizer(), rows, tmp_path / "killed", **options)
    assert resumed.to_dict() == whole.to_dict()
    assert {len(samples) for samples in whole["samples"]} == {3}
    assert list(whole["semantic_entropy"]) == [semantic_entropy(samples) for samples in whole["samples"]]
    assert max(whole["semantic_entropy"]) > 0


def test_questions_without_an_answer_are_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    inner = LineGenerator._decode_after
    monkeypatch.setattr(
        LineGenerator, "_decode_after", lambda self, last, tokens: "\n" if tokens[0] % 2 else inner(self, last, tokens)
    )
    with caplog.at_level(logging.WARNING):
        rows = generate(tmp_path / "store")
    assert 0 < len(rows) < 10
    assert f"{10 - len(rows)} of 10 questions got no answer" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": [Shot("Which town is number 0", "Rome")]}, r"shots\[0\] is question 0, too"),
        ({"template": "Question:"}, r"template='Question:' has no \{question\}"),
        ({"max_new_tokens": 250}, "the model has 256 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "store", **options)


@pytest.mark.parametrize(
    ("answer", "aliases", "match"),
    [
        ("The Beatles.", ["beatles"], "exact"),
        ("Coca Cola", ["Coca-Cola"], "exact"),
        ("the King's Arms", ["Kings Arms"], "exact"),
        ("It was Paris, France", ["Paris"], "contained"),
        ("Parisian food", ["Paris"], "none"),
        ("Paris", ["Paris, France"], "none"),
        ("anything", ["The", "!"], "none"),
        ("", [""], "none"),
        ("1989 (or 1990)", ["1990"], "contained"),
        ("It was Königsberg", ["konigsberg", "königsberg"], "contained"),
    ],
)
def test_aliases_match_as_whole_words(answer, aliases, match):
    assert match_alias(answer, aliases) == match
    assert match_alias(answer, aliases, contained=False) == ("none" if match == "contained" else match)


def test_answers_are_normalised():
    assert normalize_answer("  The  “Quick”,\tBrown-Fox's an answer! ") == "quick brown foxs answer"


def test_clusters_join_what_contains_the_other():
    assert cluster_answers(["Paris", "the paris", "Rome", "Paris, France", "roman", ""]) == [0, 0, 1, 0, 2, 3]
    assert cluster_answers(["a b c b", "x y", "b x", "b"]) == [0, 1, 0, 0]
    assert cluster_answers(["Rome", "Paris", "Rome or Paris"]) == [0, 0, 0]  # closed transitively
    assert semantic_entropy(["Paris"] * 5) == 0
    assert semantic_entropy(["Paris", "Paris", "Rome", "Rome"]) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="0 answers"):
        semantic_entropy([])


def test_balance_keeps_all_right_and_some_wrong():
    rows = Dataset.from_dict({"label": [1] * 20 + [0] * 4 + [1] * 20, "row": range(44)})
    kept = balance(rows, wrong_per_right=1.5, seed=1)
    assert sorted(kept["label"]) == [0] * 4 + [1] * 6
    assert list(kept["row"]) == sorted(kept["row"])
    assert balance(rows, 1.5, seed=2)["row"] != kept["row"]
    assert len(balance(rows, wrong_per_right=100)) == 44
    with pytest.raises(ValueError, match="0 right and 20 wrong"):
        balance(rows.select(range(20)))


@pytest.mark.parametrize(
    "value",
    ["Paris", ["Paris", " "], {"value": "Paris", "aliases": ["Paris"]}, {"text": ["Paris"], "answer_start": [3]}],
)
def test_answers_of_every_form_are_read(value):
    rows = Dataset.from_dict({"question": ["Where? ", "where", "In what?"], "answers": [value] * 3})
    read = read_questions(rows)
    assert read.answers == [["Paris"]] * 3
    assert read.groups == [0, 0, 2]
    assert read.categories == ["where", "where", "what"]
    assert len(read_questions(rows, limit=2, seed=0)) == 2


def test_questions_from_a_file_and_from_bad_rows(tmp_path, datasets_cache):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "who?", "answer": ["A"]}\n{"question": "when?", "answer": []}\n')
    assert read_questions(str(file)).texts == ["who?"]
    with pytest.raises(ValueError, match="no column 'prompt'"):
        read_questions(str(file), question_column="prompt")
    with pytest.raises(ValueError, match="column 'answer' holds 3"):
        read_questions(Dataset.from_dict({"question": ["who?"], "answer": [3]}))
    with pytest.raises(ValueError, match="none of 1 questions has an answer"):
        read_questions(Dataset.from_dict({"question": ["who?"], "answer": [[" "]]}))
    assert question_kind("Tell me a name") == "other"
    assert not {normalize_answer(shot.question) for shot in DEFAULT_SHOTS} & {"who"}


def test_rows_of_one_answer_or_one_question_are_one_group():
    rows = Dataset.from_dict(
        {"group": [7, 7, 3, 4, 5, 6], "answer": ["Paris", "Rome", "the paris", "Oslo", "x", "rome!"]}
    )
    groups = group_by_answer(rows)["group"][:]
    assert groups[0] == groups[1] == groups[2] == groups[5]
    assert len({groups[0], groups[3], groups[4]}) == 3
