"""A task and its name say the same; tasks that cannot be are refused."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_gradtools.gradmem.kv_retrieval import KVRetrievalConfig, alphabet
from hf_gradtools.gradmem.kv_retrieval.names import format_count, parse_count


LENGTHS = st.integers(1, 6)
SIZES = st.none() | st.integers(1, 10**9) | st.integers(1, 99).map(lambda n: n * 1000)
SEGMENTS = st.just((0, 0, 0)) | st.tuples(st.integers(1, 9), st.integers(0, 50), st.integers(0, 50)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[1] + drawn[2])
)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), LENGTHS, LENGTHS, SEGMENTS, st.integers(1, 300), SIZES)
def test_a_task_reads_from_its_name(pairs, key_length, value_length, segments, vocab_size, size):
    assume(pairs <= vocab_size**key_length)
    config = KVRetrievalConfig(pairs, key_length, value_length, *segments, vocab_size, size)
    assert KVRetrievalConfig.from_name(config.name) == config


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("N10-K4V4-S4(32-64)_1M", (10, 4, 4, 4, 32, 64, 62, 1_000_000)),
        ("N8-K2V2-V62_1M", (8, 2, 2, 0, 0, 0, 62, 1_000_000)),
        ("N2-K1V1-V4", (2, 1, 1, 0, 0, 0, 4, None)),
        ("N3-K2V1-S2(0-9)-V16_1500", (3, 2, 1, 2, 0, 9, 16, 1500)),
    ],
)
def test_names_as_they_are_written(name, fields):
    config = KVRetrievalConfig(*fields)
    assert KVRetrievalConfig.from_name(name) == config
    assert config.name == name


def test_numbers_of_rows_as_they_are_typed():
    assert [parse_count(text) for text in ("7", "1_000", "10K", "10k", "2M")] == [7, 1000, 10_000, 10_000, 2_000_000]
    assert [format_count(count) for count in (7, 1000, 1500, 1_500_000, 2_000_000)] == [
        "7", "1K", "1500", "1500K", "2M",
    ]  # fmt: skip
    for text in ("0", "-1", "1.5", "1G", "", "K", "many"):
        with pytest.raises(ValueError, match=r"num='.*' is no number of rows"):
            parse_count(text, "num")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is no name of a task"),
        ("N2-K1", "is no name of a task"),
        ("N2-K1V1-V4_1G", "is no name of a task"),
        ("xN2-K1V1-V4", "is no name of a task"),
        ("N0-K1V1-V4", "num_pairs=0 must be at least 1"),
        ("N2-K0V1-V4", "key_length=0 must be at least 1"),
        ("N2-K1V0-V4", "value_length=0 must be at least 1"),
        ("N5-K1V1-V4", r"num_pairs=5 needs as many different keys, and there are 4\^1 = 4"),
        ("N2-K1V1-S2(9-8)", "num_segments=2 of 9 to 8 symbols"),
        ("N1-K1V1-V0", "vocab_size=0 must be from 1"),
        ("N1-K1V1-V9999", "vocab_size=9999 must be from 1"),
        ("N2-K1V1-V4_0", "size='0' is no number of rows"),
    ],
)
def test_names_of_no_task_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        KVRetrievalConfig.from_name(name)


def test_lengths_of_segments_need_segments():
    with pytest.raises(ValueError, match="max_segment_length=8 needs segments"):
        KVRetrievalConfig(2, 1, 1, max_segment_length=8)
    with pytest.raises(ValueError, match="size=0"):
        KVRetrievalConfig(2, 1, 1, size=0)


def test_alphabets_begin_with_letters_and_digits_and_have_each_symbol_once():
    everything = alphabet(600)
    assert everything.startswith("abc")
    assert everything[:62].isascii()
    assert everything[:62].isalnum()
    assert len(set(everything)) == 600
    assert not set(everything) & set("!?:| \t\n")
