"""Reads rows back from their texts, knowing nothing of how they were made."""

import re

from hf_gradtools.gradmem.kv_retrieval import KVRetrievalConfig


PAIR = re.compile(r"!([^!?:|]+):([^!?:|]+)!")


def rows_of(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def check_row(row: dict, config: KVRetrievalConfig) -> None:
    """Everything that the name of a task says of a row."""
    pairs = [PAIR.fullmatch(pair).groups() for pair in row["kv_pairs"]]
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys) == config.num_pairs
    assert {(len(key), len(value)) for key, value in pairs} == {(config.key_length, config.value_length)}
    assert sorted(PAIR.findall(row["context"])) == sorted(pairs)
    (key,) = re.fullmatch(r"\?!([^!?:|]+):", row["query"]).groups()
    assert row["target"] == dict(pairs)[key] + "!|"
    at = row["context"].index(f"!{key}:")
    assert row["context"][at:].startswith(f"!{key}:{row['target'].removesuffix('|')}")
    assert row["context"].endswith("|")
    segments = row["context"].split("|")[:-1]
    assert len(segments) == max(config.num_segments, 1)
    for segment in segments if config.num_segments else []:
        needed = sum(len(pair.group()) for pair in PAIR.finditer(segment))
        shortest, longest = max(config.min_segment_length, needed), max(config.max_segment_length, needed)
        assert shortest <= len(segment) <= longest
        assert not set(PAIR.sub("", segment)) & set("!?:|")
