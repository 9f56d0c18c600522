"""Rows are what the name of their task says, and everything in them is drawn uniformly."""

from collections import Counter
from itertools import chain, permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from hf_gradtools.gradmem.kv_retrieval import KVRetrievalConfig, alphabet, generate
from hf_gradtools.gradmem.kv_retrieval.generate import BLOCK_ROWS, _without_repeats, draw_keys, generate_block
from tests.gradmem.kv_retrieval.reading import PAIR, check_row, rows_of


TASKS = [
    "N10-K4V4-S4(32-64)",
    "N4-K1V2-V4",  # every key
    "N40-K2V1-V9",  # half of 81 keys
    "N150-K7V1-V4",  # of 16,384 keys, most rows drawn have one twice
    "N2-K25V3-S2(0-10)-V100",  # keys that no number holds
    "N3-K1V1-S5(0-0)",  # segments of pairs alone, or of nothing
    "N5-K2V3-S3(0-20)-V500",  # symbols of one, two and three bytes
    "N1-K1V1-S1(7-7)-V1",
]


def is_uniform(drawn, outcomes):
    """Whether each of the outcomes comes as often, and nothing else; the seed is fixed."""
    counts = Counter(drawn)
    assert set(counts) <= set(outcomes)
    return chisquare([counts[one] for one in outcomes]).pvalue > 0.001


def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_what_their_name_says(name):
    config = KVRetrievalConfig.from_name(name)
    rows = rows_of(generate_block(config, seed=3, block=1))
    assert len(rows) == BLOCK_ROWS
    for row in rows[::7]:
        check_row(row, config)


@pytest.mark.parametrize("seed", [0, 2**32, 2**32 + 1, 10**30])
def test_a_block_depends_on_seed_split_and_number(seed):
    config = KVRetrievalConfig.from_name("N2-K3V3-S2(4-9)")
    here = generate_block(config, seed, 0)
    assert generate_block(config, seed, 0) == here
    for other in (generate_block(config, seed + 1, 0), generate_block(config, seed, 1),
                  generate_block(config, seed, 0, "valid")):  # fmt: skip
        assert not set(other["context"]) & set(here["context"])


def test_keys_of_few_are_uniform_in_any_order():
    keys = draw_keys(KVRetrievalConfig(2, 1, 1, vocab_size=4), rng())[..., 0]
    assert is_uniform(map(tuple, keys.tolist()), list(permutations(range(4), 2)))


@pytest.mark.parametrize("name", ["N40-K2V1-V9", "N150-K7V1-V4", "N2-K40V1-V7"])
def test_symbols_of_keys_are_uniform_at_each_place(name):
    config = KVRetrievalConfig.from_name(name)
    keys = draw_keys(config, rng())
    assert keys.shape == (BLOCK_ROWS, config.num_pairs, config.key_length)
    for place in (0, 1, config.key_length // 2, config.key_length - 1):
        assert is_uniform(keys[:, 0, place].tolist(), range(config.vocab_size))
        assert is_uniform(keys[:, -1, place].tolist(), range(config.vocab_size))


def test_keys_that_are_drawn_again_leave_all_orders_uniform(monkeypatch):
    monkeypatch.setattr(generate, "FEW_NUMBERS", 0)
    generator = rng()
    drawn = np.concatenate([_without_repeats(generator, 3, 7) for _ in range(5)])  # 2 of 5 rows have a number twice
    assert is_uniform(map(tuple, drawn.tolist()), list(permutations(range(7), 3)))


def test_queries_values_and_filler_are_uniform():
    config = KVRetrievalConfig.from_name("N3-K2V1-S2(5-9)-V6")
    rows = rows_of(generate_block(config, seed=0, block=0))
    pairs = [[PAIR.fullmatch(pair).groups() for pair in row["kv_pairs"]] for row in rows]
    asked = [[f"?!{key}:" for key, _ in of_row].index(row["query"]) for row, of_row in zip(rows, pairs, strict=True)]
    symbols = alphabet(6)
    assert is_uniform(asked, range(3))
    assert is_uniform([value for of_row in pairs for _, value in of_row], symbols)
    assert is_uniform(chain.from_iterable(PAIR.sub("", row["context"]).replace("|", "") for row in rows), symbols)


def test_lengths_of_segments_and_places_of_pairs_are_uniform():
    fixed = rows_of(generate_block(KVRetrievalConfig.from_name("N1-K1V1-S3(9-9)"), seed=0, block=0))
    segments = [next(i for i, text in enumerate(row["context"].split("|")) if "!" in text) for row in fixed]
    places = [row["context"].split("|")[i].index("!") for row, i in zip(fixed, segments, strict=True)]
    assert is_uniform(segments, range(3))
    assert is_uniform(places, range(5))  # four symbols of filler
    free = generate_block(KVRetrievalConfig.from_name("N1-K1V1-S2(3-9)"), seed=0, block=0)
    lengths = [len(text) for context in free["context"] for text in context.split("|")[:-1] if "!" not in text]
    assert is_uniform(lengths, range(3, 10))
