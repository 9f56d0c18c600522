from __future__ import annotations

import copy

import pytest
import torch

from hf_gradtools.sae.held_out import hold_out_tokens
from tests.sae.sources import TensorSource, correlated


def joined(source, *bounds):
    return torch.cat([chunk["a"] for chunk in source.chunks(*bounds)])


def test_the_last_tokens_are_held_out():
    x = correlated(1000, 4)
    rest, held_out = hold_out_tokens(TensorSource({"a": x}), 0.1)
    assert (rest.num_tokens, held_out.num_tokens) == (900, 100)
    assert torch.equal(joined(rest), x[:900])
    assert torch.equal(joined(held_out), x[900:])
    assert torch.equal(joined(held_out, 30, 70), x[930:970])
    assert (held_out.d_in("a"), held_out.dtype) == (4, torch.float32)


def test_a_share_of_nothing_keeps_the_source():
    source = TensorSource({"a": correlated(10, 4)})
    assert hold_out_tokens(source, 0) == (source, None)


def test_a_copy_with_fewer_hookpoints_leaves_the_source_as_it_is():
    source = TensorSource({"a": correlated(100, 4), "b": correlated(100, 4, seed=1)})
    rest, held_out = hold_out_tokens(source, 0.5)
    one = copy.copy(rest)
    one.hookpoints = ["b"]
    assert [set(chunk) for chunk in one.chunks()] == [{"b"}]
    assert source.hookpoints == rest.hookpoints == held_out.hookpoints == ["a", "b"]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_nothing_is_named(share):
    with pytest.raises(ValueError, match=rf"eval_share={share} holds out \d+ of 100 tokens"):
        hold_out_tokens(TensorSource({"a": correlated(100, 4)}), share)


def test_tokens_outside_of_the_part_are_refused():
    rest, _ = hold_out_tokens(TensorSource({"a": correlated(100, 4)}), 0.5)
    with pytest.raises(ValueError, match="end=60 are not within the 50 tokens"):
        rest.chunks(0, 60)
