"""Blocks: x and y are one token apart, offsets depend on seed and index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_gradtools.nanogpt.data import TokenBlocks


TOKENS = np.arange(1000, dtype=np.uint16)


def test_labels_are_the_next_tokens_of_the_file():
    batch = TokenBlocks(TOKENS, 8).batch(range(50))
    x, y = batch["input_ids"], batch["shift_labels"]
    assert x.shape == y.shape == (50, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(x, x[:, :1] + torch.arange(8))
    assert torch.equal(y, x + 1)


def test_samples_do_not_depend_on_what_was_asked_before():
    blocks = TokenBlocks(TOKENS, 8, seed=3)
    again = TokenBlocks(TOKENS, 8, seed=3)
    assert np.array_equal(blocks.offsets(range(100))[40:], again.offsets(range(40, 100)))
    assert not np.array_equal(blocks.offsets(range(100)), TokenBlocks(TOKENS, 8, seed=4).offsets(range(100)))
    assert torch.equal(blocks[7]["input_ids"], blocks.batch([3, 7])["input_ids"][1])


def test_offsets_are_uniform_over_all_blocks():
    offsets = TokenBlocks(TOKENS, 990).offsets(range(10_000))  # ten places where a block can begin
    counts = np.bincount(offsets, minlength=10)
    assert len(counts) == 10
    assert ((counts - 1000) ** 2 / 1000).sum() < 33  # chi-square, 9 degrees of freedom, p = 1e-4


def test_every_seed_is_another_draw():
    starts = {int(TokenBlocks(TOKENS, 1, seed).offsets([0])[0]) for seed in range(-5, 300)}
    assert len(starts) > 200


def test_a_plain_dataloader_takes_it():
    batch = next(iter(DataLoader(TokenBlocks(TOKENS, 8), batch_size=4, shuffle=True)))
    assert batch["shift_labels"].shape == (4, 8)
    assert len(TokenBlocks(TOKENS, 8)) == 125


def test_too_few_tokens_are_refused():
    assert TokenBlocks(TOKENS, 999)[0]["input_ids"][0] == 0
    with pytest.raises(ValueError, match="block_size=1000 needs 1001 tokens, and there are 1000"):
        TokenBlocks(TOKENS, 1000)
    with pytest.raises(IndexError):
        TokenBlocks(TOKENS, 8)[125]
