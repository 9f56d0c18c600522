"""Attention with a second derivative: values and gradients of open attention, and nothing of its size is kept."""

from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hf_gradtools.gradmem import attention
from hf_gradtools.gradmem.attention import twice_differentiable_attention


def inputs(rows=2, heads=2, queries=3, keys=3, width=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, n, width) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def looks(*shape):
    """A mask by which every query sees its own key and some others."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return mask | torch.eye(*shape[-2:], dtype=torch.bool)


ADDED = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CASES = {
    "open": {},
    "causal": {"is_causal": True},
    "mask of each row": {"mask": looks(2, 1, 3, 3)},
    "mask of each row and head": {"mask": looks(2, 2, 3, 3)},
    "mask for all": {"mask": looks(1, 1, 3, 3)},
    "added to the scores": {"mask": ADDED},
    "scaled": {"scaling": 0.9},
}


def open_attention(query, key, value, mask=None, scaling=None, is_causal=False):
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


@pytest.fixture(params=[2**18, 9, 1], ids=["one block", "a head at a time", "less than a head"])
def _block(request):
    with mock.patch.object(attention, "BLOCK_NUMBERS", request.param):
        yield


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("case", CASES)
def test_both_derivatives_are_those_of_finite_differences(case):
    def run(*tensors):
        return twice_differentiable_attention(*tensors, **CASES[case])

    torch.testing.assert_close(run(*inputs()), open_attention(*inputs(), **CASES[case]))
    assert gradcheck(run, inputs())
    assert gradgradcheck(run, inputs())


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_derivatives_for_some_of_the_inputs(wanted):
    tensors = inputs()

    def run(*some):
        every = [tensor.detach() for tensor in tensors]
        for index, tensor in zip(wanted, some, strict=True):
            every[index] = tensor
        return twice_differentiable_attention(*every, is_causal=True)

    assert gradgradcheck(run, [tensors[index] for index in wanted])


def test_fewer_queries_than_keys():
    assert gradgradcheck(twice_differentiable_attention, inputs(queries=2, keys=5))


def test_dropped_weights_are_the_same_in_both_derivatives():
    def run(*tensors):
        torch.manual_seed(0)
        return twice_differentiable_attention(*tensors, is_causal=True, dropout=0.4)

    assert gradcheck(run, inputs())
    assert gradgradcheck(run, inputs())


def test_nothing_as_large_as_the_weights_is_kept():
    tensors, sizes = inputs(queries=64, keys=64, width=4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        output = twice_differentiable_attention(*tensors)
        grads = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    assert max(sizes) == tensors[0].numel()
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)


def test_half_precision_is_near_to_single():
    for dtype in (torch.bfloat16, torch.float16):
        tensors = inputs(dtype=dtype)
        output = twice_differentiable_attention(*tensors, is_causal=True)
        grads = torch.autograd.grad(output.float().square().sum(), tensors, create_graph=True)
        seconds = torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), tensors)
        exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
        expected = torch.autograd.grad(open_attention(*exact, is_causal=True).square().sum(), exact, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in expected), exact)
        for found, wanted in zip([*grads, *seconds], [*expected, *second], strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).norm() < 0.05 * wanted.norm()
