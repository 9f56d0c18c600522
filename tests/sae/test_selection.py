"""Selections against torch.topk: widths, ties, signs, types, NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools.sae import selection
from hf_gradtools.sae.selection import largest_in_batch, linear_top_k, top_k


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64]


@st.composite
def tables(draw, dtypes=DTYPES):
    """`[N, F]` with few distinct values, so that ties abound, or with many; and a k."""
    rows, width = draw(st.integers(0, 5)), draw(st.integers(1, 160))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, shift = draw(st.sampled_from([1, 3, 1000])), draw(st.sampled_from([-2.0, 0.0, 2.0]))
    table = (scale * (torch.randn(rows, width, generator=generator) + shift)).to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):
        table = table.round() if table.is_floating_point() else table // 2
    return table, draw(st.one_of(st.integers(1, width), st.integers(1, max(1, width // 16)), st.just(width)))


def ranked(values):
    return values.double().relu().sort(dim=-1, descending=True).values


@settings(max_examples=200, deadline=None)
@given(tables())
def test_top_k_is_torchs_wherever_entries_are_positive(case):
    table, k = case
    values, columns = top_k(table, k)
    assert torch.equal(ranked(values), ranked(table.topk(k).values))
    assert torch.equal(values, table.gather(1, columns))
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 67])
def test_top_k_shows_nan_and_infinity(width, dtype):
    table = torch.rand(3, width).to(dtype)
    table[0, 5], table[1, 7], table[2, 9] = torch.nan, torch.inf, -torch.inf
    values, columns = top_k(table, 2)
    assert values[0].isnan().sum() == 1
    assert 5 in columns[0]
    assert values[1].isinf().sum() == 1
    assert values[2].isfinite().all()
    assert top_k(torch.full((1, width), -torch.nan, dtype=dtype), 2)[0].isnan().all()


def test_top_k_takes_tables_that_are_not_contiguous():
    table = torch.randn(64, 5).T
    assert not table.is_contiguous()
    assert torch.equal(ranked(top_k(table, 3)[0]), ranked(table.topk(3).values))


@pytest.mark.parametrize("chunk_bytes", [1, 700, 10**6])
def test_linear_top_k_does_not_depend_on_its_chunks(chunk_bytes, monkeypatch):
    monkeypatch.setattr(selection, "CHUNK_BYTES", chunk_bytes)
    x, weight, bias = torch.randn(11, 4).double(), torch.randn(32, 4).double(), torch.randn(32).double()
    values, columns = linear_top_k(x, weight, bias, 5)
    dense = (x @ weight.T + bias).relu()
    torch.testing.assert_close(values.sort(descending=True).values, dense.topk(5).values)
    torch.testing.assert_close(values, dense.gather(1, columns))


@settings(max_examples=200, deadline=None)
@given(tables([torch.float32, torch.float64, torch.bfloat16]))
def test_the_largest_of_a_batch_are_those_of_the_flat_table(case):
    table, k = case
    pattern = largest_in_batch(table, k)
    taken = table[pattern.rows, pattern.indices]
    flat = table.flatten()
    expected = flat[flat > 0].sort(descending=True).values[: k * len(table)]
    assert torch.equal(taken.sort(descending=True).values, expected)  # fewer positive ones than wanted: all of them
    places = pattern.rows * table.shape[1] + pattern.indices
    assert torch.equal(places, places.unique())  # each once, token by token
    assert pattern.offsets.tolist() == [int((pattern.rows < row).sum()) for row in range(len(table) + 1)]


@pytest.mark.parametrize("distinct", [1, 2])
def test_the_largest_of_a_batch_of_ties_are_as_many_as_wanted(distinct):
    table = torch.randint(1, distinct + 1, (50, 300)).float()
    pattern = largest_in_batch(table, 7)
    assert pattern.indices.numel() == 350
    assert int((table[pattern.rows, pattern.indices] == distinct).sum()) == min(350, int((table == distinct).sum()))


def test_the_bound_from_a_sample_loses_no_entry():
    table = torch.randn(40, 6000)  # more entries than are sampled, and few tokens hold all the large ones
    table[3] += 100
    assert table.numel() > 200_000
    pattern = largest_in_batch(table, 4)
    assert set(pattern.rows.tolist()) == {3}
    values = table[pattern.rows, pattern.indices]
    assert torch.equal(values.sort(descending=True).values, table.flatten().topk(160).values)
