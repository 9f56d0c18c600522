"""Batches against ones written by hand. Ids: ! 4, ? 5, : 6, | 7, then a 8, b 9, …"""

from collections import Counter

import pytest

from hf_gradtools.gradmem.kv_retrieval import (
    GradMemCollator,
    PromptCollator,
    build_kv_tokenizer,
    generate_kv_dataset,
)


TOKENIZER = build_kv_tokenizer(8)
SHORT = {"context": "!a:bc!|", "query": "?!a:", "target": "bc!|", "kv_pairs": ["!a:bc!"]}
LONG = {
    "context": "h!a:b!gg!c:d!|", "query": "?!c:", "target": "d!|", "kv_pairs": ["!a:b!", "!c:d!"],
}  # fmt: skip


def lists(batch):
    return {name: values.tolist() for name, values in batch.items()}


def test_contexts_queries_and_answers():
    assert lists(GradMemCollator(TOKENIZER)([SHORT, LONG])) == {
        "context_ids": [
            [4, 8, 6, 9, 10, 4, 7, 0, 0, 0, 0, 0, 0, 0],
            [15, 4, 8, 6, 9, 4, 14, 14, 4, 10, 6, 11, 4, 7],
        ],
        "context_attention_mask": [[1] * 7 + [0] * 7, [1] * 14],
        "input_ids": [[5, 4, 8, 6, 9, 10, 4, 7], [5, 4, 10, 6, 11, 4, 7, 0]],
        "attention_mask": [[1] * 8, [1] * 7 + [0]],
        "labels": [[-100] * 4 + [9, 10, 4, 7], [-100] * 4 + [11, 4, 7, -100]],
    }


def test_two_queries_begin_with_the_row_s_own():
    other = {**LONG, "query": "?!a:", "target": "b!|"}
    batch = lists(GradMemCollator(TOKENIZER, 2, max_context_length=3)([LONG, other]))
    c, a = [5, 4, 10, 6, 11, 4, 7], [5, 4, 8, 6, 9, 4, 7]
    assert batch["input_ids"] == [c, a, a, c]
    assert batch["labels"] == [[-100] * 4 + ids[4:] for ids in (c, a, a, c)]
    assert batch["context_ids"] == [[15, 4, 8]] * 2


def test_prompts_have_the_context_before_each_query():
    batch = lists(PromptCollator(TOKENIZER, 2)([LONG]))
    context = [15, 4, 8, 6, 9, 4, 14, 14, 4, 10, 6, 11, 4, 7]
    assert batch == {
        "input_ids": [[*context, 5, 4, 10, 6, 11, 4, 7], [*context, 5, 4, 8, 6, 9, 4, 7]],
        "attention_mask": [[1] * 21] * 2,
        "labels": [[-100] * 18 + [11, 4, 7], [-100] * 18 + [9, 4, 7]],
    }
    short = lists(PromptCollator(TOKENIZER, max_context_length=2)([SHORT]))
    assert short["input_ids"] == [[4, 8, 5, 4, 8, 6, 9, 10, 4, 7]]


def test_pairs_are_asked_for_as_often_wherever_they_stand():
    rows = generate_kv_dataset("N4-K1V1-V8", 2000)
    collator = GradMemCollator(TOKENIZER, 2)
    asked = [(row, f"!{query[2:]}{target[:-1]}") for row in rows for query, target in collator._queries(row)]
    places = Counter(row["kv_pairs"].index(pair) for row, pair in asked)
    assert sum(places.values()) == 4000
    assert all(900 < places[place] < 1100 for place in range(4))


@pytest.mark.parametrize("row", [SHORT, {"context": "a", "query": "b", "target": "cd"}])
def test_answers_may_end_in_an_eos_token(row):
    plain, ended = (GradMemCollator(TOKENIZER, add_eos_token=add)([row]) for add in (False, True))
    for name in ("input_ids", "labels"):
        assert ended[name].tolist() == [[*plain[name][0].tolist(), TOKENIZER.eos_token_id]]
    assert ended["attention_mask"].shape == ended["input_ids"].shape


def test_a_context_may_be_empty():
    batch = GradMemCollator(TOKENIZER)([{**SHORT, "context": ""}])
    assert batch["context_ids"].shape == (1, 0)
    assert not any(values.is_floating_point() for values in batch.values())


def test_what_cannot_be_collated_is_told():
    for name in ("queries_per_context", "max_context_length"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            GradMemCollator(TOKENIZER, **{name: 0})
    with pytest.raises(ValueError, match="queries_per_context=2, and a row has 1 kv_pairs"):
        GradMemCollator(TOKENIZER, 2)([SHORT])
    with pytest.raises(ValueError, match="a row has 0 kv_pairs"):
        GradMemCollator(TOKENIZER, 2)([{"context": "a", "query": "b", "target": "c"}])
    with pytest.raises(ValueError, match="have no pair of its query and target"):
        GradMemCollator(TOKENIZER, 2)([{**LONG, "target": "e!|"}])


@pytest.mark.parametrize(("token", "message"), [("pad_token", "no pad token"), ("eos_token", "no eos token")])
def test_tokenizers_without_the_tokens_that_are_needed_are_refused(token, message):
    tokenizer = build_kv_tokenizer(8)
    setattr(tokenizer, token, None)
    with pytest.raises(ValueError, match=message):
        PromptCollator(tokenizer, add_eos_token=True)


@pytest.mark.parametrize("collator", [GradMemCollator, PromptCollator])
def test_a_tokenizer_of_a_smaller_alphabet_is_refused(collator):
    """Its unknown token would stand for several values."""
    rows = generate_kv_dataset("N2-K1V1-V62", 20).to_list()
    with pytest.raises(ValueError, match="does not know all symbols of .* saved with the rows"):
        collator(build_kv_tokenizer(4), 2)(rows)
    collator(build_kv_tokenizer(62), 2)(rows)
    collator(build_kv_tokenizer(4))([{"context": "z", "query": "y", "target": "x"}])  # other texts may have some
