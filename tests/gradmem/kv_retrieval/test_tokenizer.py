"""Each symbol is one token, also of a tokenizer that was saved, and texts come back as they were."""

import pytest
from transformers import AutoTokenizer

from hf_gradtools.gradmem.kv_retrieval import alphabet, build_kv_tokenizer, generate_kv_dataset


@pytest.mark.parametrize("vocab_size", [4, 62, 600])
def test_each_symbol_is_a_token(vocab_size, tmp_path):
    text = "!?:|" + alphabet(vocab_size)
    built = build_kv_tokenizer(vocab_size)
    built.save_pretrained(tmp_path)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == vocab_size + 8
        assert tokenizer(text).input_ids == list(range(4, vocab_size + 8))
        assert tokenizer.decode(range(4, vocab_size + 8)) == text
        assert all(len(tokenizer(symbol).input_ids) == 1 for symbol in text)
        assert tokenizer("~ \né").input_ids == [3] * 4
        assert tokenizer.convert_tokens_to_ids(["[PAD]", "[BOS]", "[EOS]", "[UNK]"]) == [0, 1, 2, 3]
        ids = [getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")]
        assert ids == [0, 1, 2, 3]


def test_contexts_come_back():
    tokenizer = build_kv_tokenizer(300)
    for row in generate_kv_dataset("N3-K2V2-S2(20-30)-V300", 20):
        ids = tokenizer(row["context"]).input_ids
        assert len(ids) == len(row["context"])
        assert tokenizer.decode(ids) == row["context"]


def test_an_alphabet_of_one_s_own():
    tokenizer = build_kv_tokenizer(symbols="日本語")
    assert tokenizer("!日:語!").input_ids == [4, 8, 6, 10, 4]
    assert tokenizer.decode([8, 9, 10]) == "日本語"


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ("ab?c|", r"has \? \|, which mark keys, queries and segments"),
        ("abca", r"\['a'\] repeat"),
        ("", "must have each symbol once"),
        ("a b", "cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("ae\u0301", "cannot be seen alone"),
    ],
)
def test_alphabets_that_cannot_be_are_refused(symbols, message):
    with pytest.raises(ValueError, match=message):
        build_kv_tokenizer(symbols=symbols)
