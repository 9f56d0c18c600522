import random

import pytest

from hf_gradtools.nanogpt.sampling.segments import decode, segment_tokens, token_label


TEXT = "a [bold]\n€ 漢字 🙂 é["


def texts(tokenizer, ids):
    return [segment.text for segment in segment_tokens(tokenizer, ids)]


@pytest.mark.parametrize("kind", ["byte_level", "our_bytes", "byte_fallback"])
def test_bytes_of_a_character_stay_together(kind, request):
    tokenizer = request.getfixturevalue(kind)
    ids = list(TEXT.encode())
    assert texts(tokenizer, ids) == list(TEXT)
    assert [token for segment in segment_tokens(tokenizer, ids) for token in segment.tokens] == list(range(len(ids)))


@pytest.mark.parametrize("kind", ["byte_level", "our_bytes", "byte_fallback"])
def test_any_bytes_join_to_what_they_decode_to(kind, request):
    tokenizer = request.getfixturevalue(kind)
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.choice([*range(256), 0xE2, 0x82, 0xAC, 0xF0, 0x9F]) for _ in range(25)]
        segments = segment_tokens(tokenizer, ids)
        assert "".join(segment.text for segment in segments) == decode(tokenizer, ids)
        assert [token for segment in segments for token in segment.tokens] == list(range(25))


def test_a_leading_space_stays_with_its_word(byte_fallback):
    assert texts(byte_fallback, [256, 257, 256]) == ["hello", " you", " hello"]


def test_an_unfinished_character_ends_the_text(byte_level):
    assert texts(byte_level, [97, 0xE2, 0x82]) == ["a", "\ufffd"]


def test_characters_are_their_own_pieces(chars):
    assert texts(chars, chars("[/] $a$")["input_ids"]) == list("[/] $a$")
    assert segment_tokens(chars, []) == []


def test_labels_show_what_cannot_be_seen(chars, byte_level, byte_fallback):
    assert [token_label(chars, i) for i in (0, 1, 2)] == ["\\n", "␣", "["]
    assert token_label(byte_fallback, 0xE2) == "<0xE2>"
    assert token_label(byte_level, 0xE2) == "â"  # GPT-2's name of the byte
