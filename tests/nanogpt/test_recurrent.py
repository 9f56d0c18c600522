"""Parallel forms against the recurrences, with their gradients; states carried from call to call."""

from functools import partial

import pytest
import torch

from hf_gradtools.nanogpt import recurrent
from hf_gradtools.nanogpt.recurrent import linear_attention, linear_recurrence
from tests.nanogpt import references as ref
from tests.nanogpt.tiny import NO_POSITIONS, build


LENGTHS = [1, 2, 3, 17, 128]
CLOSE = {"atol": 1e-10, "rtol": 1e-7}


def mixer(name, **fields):
    """The first attention of a model, as a function of what goes into it."""
    one = build(attention_variant=name, n_layer=1, block_size=256, **NO_POSITIONS, **fields)
    attn = one.transformer.h[0].attn

    def run(x, mask=None, cache=None):
        context = one.transformer._context(x, mask, None, cache)
        return attn(x, context, past_key_values=cache)[0]

    return attn, run


def gradients(out, inputs, direction):
    return torch.autograd.grad((out * direction).sum(), inputs)


def linear_by_recurrence(attn, x, keep=None):
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in attn.c_attn(x).split(16, dim=-1))
    return attn.c_proj(ref.linear_attention(q, k, v, keep).transpose(1, 2).flatten(-2))


def ssm_by_recurrence(attn, x, keep=None):
    p = {
        "in_proj": attn.in_proj.weight, "conv_weight": attn.conv.weight[:, 0], "conv_bias": attn.conv.bias,
        "x_proj": attn.x_proj.weight, "dt_norm": attn.dt_norm.weight, "b_norm": attn.b_norm.weight,
        "c_norm": attn.c_norm.weight, "dt_proj": attn.dt_weight, "dt_bias": attn.dt_bias, "A_log": attn.A_log,
        "D": attn.D, "out_norm": attn.out_norm.weight, "out_proj": attn.out_proj.weight,
    }  # fmt: skip
    return ref.ssm(x, p, attn.out_norm.eps, keep)


RECURRENCES = {"linear": linear_by_recurrence, "ssm": ssm_by_recurrence}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "chunk"), [("linear", None), ("ssm", None), ("ssm", 16)])
def test_the_parallel_form_and_its_gradients_are_those_of_the_recurrence(name, chunk, length, monkeypatch):
    """ssm: as a CPU takes it, step by step, and as an accelerator does, in chunks."""
    monkeypatch.setattr(recurrent, "linear_recurrence", partial(linear_recurrence, chunk=chunk))
    attn, run = mixer(name)
    x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
    direction, inputs = torch.randn_like(x), [x, *attn.parameters()]
    found, expected = run(x), RECURRENCES[name](attn, x)
    torch.testing.assert_close(found, expected, **CLOSE)
    # Keys and queries of a single token cancel in linear attention, and so do the gradients: to rounding.
    torch.testing.assert_close(gradients(found, inputs, direction), gradients(expected, inputs, direction), **CLOSE)


@pytest.mark.parametrize("name", RECURRENCES)
def test_padding_leaves_the_state_as_it_is(name):
    attn, run = mixer(name)
    keep = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        x = torch.randn(2, 6, 16, dtype=torch.float64)
        torch.testing.assert_close(run(x, keep.long())[keep], RECURRENCES[name](attn, x, keep)[keep], **CLOSE)


def test_the_tokens_own_term_is_felt_by_the_state_space():
    """D u, the gate and the convolution are there: none of them can be dropped unnoticed."""
    attn, run = mixer("ssm")
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    before = run(x)
    for parameter in (attn.D, attn.conv.weight, attn.conv.bias, attn.dt_bias, attn.A_log):
        kept = parameter.data.clone()
        parameter.data += 0.5
        assert (run(x) - before).abs().max() > 1e-4
        parameter.data = kept


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("chunk", [None, 5, 16])
def test_a_recurrence_goes_on_from_a_state(length, chunk):
    decay, inputs = torch.rand(2, length, 3, dtype=torch.float64), torch.randn(2, length, 3, dtype=torch.float64)
    state = torch.randn(2, 3, dtype=torch.float64)
    h, last = linear_recurrence(decay, inputs, state, chunk)
    for t in range(length):
        state = decay[:, t] * state + inputs[:, t]
        torch.testing.assert_close(h[:, t], state)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_recurrence_survives_decays_of_zero_and_long_sequences(chunk):
    decay = torch.zeros(1, 1000, 1)
    decay[:, ::7] = 1e-30
    h, _ = linear_recurrence(decay.requires_grad_(), torch.ones(1, 1000, 1), torch.zeros(1, 1), chunk)
    torch.testing.assert_close(h, torch.ones_like(h))
    h.sum().backward()
    assert decay.grad.isfinite().all()


def test_linear_attention_goes_on_from_a_state():
    q, k = (torch.rand(1, 2, 70, 3, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 2, 70, 3, dtype=torch.float64)
    whole, last = linear_attention(q, k, v, None)
    first, state = linear_attention(q[:, :, :66], k[:, :, :66], v[:, :, :66], None)
    second, state = linear_attention(q[:, :, 66:], k[:, :, 66:], v[:, :, 66:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole)
    torch.testing.assert_close(state, last)
