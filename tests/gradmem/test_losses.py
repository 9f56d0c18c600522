"""The loss by chunks: values and both derivatives of open cross-entropy, without ever holding all logits."""

from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from benchmarks.common import peak_bytes
from hf_gradtools.gradmem import losses
from hf_gradtools.gradmem.losses import InnerPass, causal_lm_loss, linear_cross_entropy


LABELS = torch.tensor([3, 0, -100, 5, 1, -100, 6])


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 4), (8, 4), (8,)]  # hidden states, weight, bias
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def open_loss(hidden, weight, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias), LABELS, reduction="none", ignore_index=-100)


@pytest.fixture(params=[2**23, 24, 1], ids=["one chunk", "3 tokens", "a token"])
def _chunk(request):
    with mock.patch.object(losses, "CHUNK_NUMBERS", request.param):
        yield


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("has_bias", [True, False])
def test_both_derivatives_are_those_of_finite_differences(has_bias):
    def run(hidden, weight, bias=None):
        return linear_cross_entropy(hidden, weight, LABELS, bias)

    tensors = inputs()[: 3 if has_bias else 2]
    torch.testing.assert_close(run(*tensors), open_loss(*tensors))
    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


@pytest.mark.usefixtures("_chunk")
def test_the_inner_gradient_leaves_the_weights_out_and_the_outer_one_has_them():
    """The gradient for the hidden states alone, and then of that for everything."""
    tensors = inputs()
    along = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for is_ours in (True, False):
        inner = InnerPass()
        loss = linear_cross_entropy(*tensors[:2], LABELS, tensors[2], inner) if is_ours else open_loss(*tensors)
        inner.memory_only = True
        (grad,) = torch.autograd.grad(loss.square().sum(), tensors[0], create_graph=True)
        inner.memory_only = False
        found.append(torch.autograd.grad((grad * along).sum() + loss.sum(), tensors))
    torch.testing.assert_close(*found)


def test_a_large_vocabulary_is_never_there_at_once():
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(20_000, 8, requires_grad=True)
    labels = torch.randint(20_000, (512,))

    def step():
        inner = InnerPass(memory_only=True)
        loss = linear_cross_entropy(hidden, weight, labels, None, inner).mean()
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        inner.memory_only = False
        grad.square().sum().backward()

    with mock.patch.object(losses, "CHUNK_NUMBERS", 2**18):
        peak, _ = peak_bytes(step)
    assert peak < 512 * 20_000 * 4 / 4  # a quarter of the logits


def test_bfloat16_is_taken_in_single_precision():
    exact, rounded = inputs(), [tensor.detach().bfloat16().requires_grad_() for tensor in inputs()]
    found = linear_cross_entropy(*rounded[:2], LABELS, rounded[2])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), open_loss(*exact), rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(found.sum(), rounded)
    for grad, expected in zip(grads, torch.autograd.grad(open_loss(*exact).sum(), exact), strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.double() - expected).norm() < 0.05 * expected.norm()


def test_the_loss_of_queries_is_shifted_and_divided():
    logits, labels = torch.randn(2, 5, 8), torch.randint(8, (2, 5))
    labels[0, :3] = -100
    each = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none", ignore_index=-100)
    torch.testing.assert_close(causal_lm_loss(logits, labels), each.sum() / 6)
    torch.testing.assert_close(causal_lm_loss(logits, labels, 9), each.sum() / 9)
