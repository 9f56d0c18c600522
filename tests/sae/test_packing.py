import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gradtools.sae.packing import token_blocks


LETTERS = "abcdefghij"
EOS, BOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<eos>", "<bos>", *LETTERS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def ids(text):
    return [3 + LETTERS.index(letter) for letter in text.split()]


def test_documents_follow_one_another_with_eos_between(tokenizer):
    rows = token_blocks(["a b c", " ", "d e", "f g h i"], tokenizer, 4, seed=None)
    expected = [*ids("a b c"), EOS, *ids("d e"), EOS, *ids("f g h i"), EOS]
    assert rows.flatten().tolist() == expected[:12]
    assert rows.dtype == torch.int64
    assert rows.shape == (3, 4)


def test_each_sequence_begins_with_bos(tokenizer):
    rows = token_blocks(["a b c", "d e f g"], tokenizer, 4, bos=True, seed=None)
    assert rows.tolist() == [[BOS, *ids("a b c")], [BOS, EOS, *ids("d e")], [BOS, *ids("f g"), EOS]]


def test_the_seed_shuffles_whole_documents(tokenizer):
    texts = [f"{a} {a} {a}" for a in LETTERS]
    first, again, other = (token_blocks(texts, tokenizer, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == sorted(other.tolist()) == [[3 + i] * 3 + [EOS] for i in range(10)]


def test_max_tokens_ends_at_a_whole_sequence(tokenizer):
    texts = ["a b c d e"] * 3000
    assert token_blocks(texts, tokenizer, 4, max_tokens=11).shape == (2, 4)
    assert token_blocks(texts, tokenizer, 4).shape == (3000 * 6 // 4, 4)


def test_rows_and_files_are_read_by_their_text_column(tokenizer, tmp_path, datasets_cache):
    texts = ["a b c", "d e f"]
    rows = Dataset.from_dict({"text": texts, "other": ["x", "y"]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    expected = token_blocks(texts, tokenizer, 4)
    assert torch.equal(token_blocks(rows, tokenizer, 4), expected)
    assert torch.equal(token_blocks(str(file), tokenizer, 4, text_column="body"), expected)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts are empty"),
        (["", " \n"], {}, "texts are empty"),
        (Dataset.from_dict({"text": [""]}), {}, "texts are empty"),
        (["a b"], {}, "have 3 tokens, which fill no sequence of context_length=4"),
        (["a", 3], {}, r"texts\[1\] is '3', a int"),
        (["a"], {"context_length": 0}, "context_length=0 leaves no room"),
        (["a"], {"context_length": 1, "bos": True}, "Pass at least 2"),
        (["a"], {"max_tokens": 3}, "max_tokens=3 is below context_length=4"),
        ("nothing.jsonl", {}, "there is no file 'nothing.jsonl'"),
    ],
)
def test_bad_input_is_named(tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        token_blocks(texts, tokenizer, **{"context_length": 4, **options})
