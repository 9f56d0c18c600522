"""Character and byte tokenizers: nothing of a text is lost, nothing is added."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_gradtools.nanogpt.data import byte_tokenizer, char_tokenizer, encode_text


TEXT = "  hé😀llo \n\n\t\r\n[UNK] <pad> \u200b\u2028 x\n"


@pytest.mark.parametrize("make", [lambda: char_tokenizer(TEXT), byte_tokenizer])
def test_tokenizer_survives_saving_and_gives_the_text_back(make, tmp_path):
    make().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded(TEXT)["input_ids"]
    assert loaded.decode(ids) == loaded.decode(ids, skip_special_tokens=True) == TEXT
    assert encode_text(loaded, TEXT) == ids


def test_ids_are_those_of_the_sorted_characters():
    characters = sorted(set(TEXT))
    tokenizer = char_tokenizer(TEXT)
    assert len(tokenizer) == len(characters)
    assert tokenizer(TEXT)["input_ids"] == [characters.index(c) for c in TEXT]
    assert tokenizer.all_special_ids == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=50, deadline=None)
def test_bytes_are_those_of_utf8(text):
    assert TOKENIZER(text)["input_ids"] == list(text.encode()) == encode_text(TOKENIZER, text)
    assert TOKENIZER.decode(list(text.encode())) == text


TOKENIZER = byte_tokenizer()


def test_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"character 'Q' \(U\+0051\) at position 2 is none of the 3"):
        encode_text(char_tokenizer("abc"), "abQ")


def test_vocabulary_that_is_no_set_of_characters_is_refused():
    with pytest.raises(ValueError, match="'ab' is not one character"):
        char_tokenizer({"ab": 0})
    with pytest.raises(ValueError, match="must be 0 to 1"):
        char_tokenizer({"a": 0, "b": 2})
