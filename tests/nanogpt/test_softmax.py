"""What makes scores weights: against the formulas, and the contract of them all."""

import math

import pytest
import torch

from hf_gradtools.nanogpt.registry import VARIANTS
from tests.nanogpt import references as ref
from tests.nanogpt.tiny import config


HEADS = 3


def weighting(name, **fields):
    one = VARIANTS["softmax"][name](config(softmax_variant_attn=name, **fields), 0, HEADS).double()
    for parameter in one.parameters():
        parameter.data *= 1 + torch.rand_like(parameter)
    return one


def scores_and_allowed():
    allowed = torch.rand(2, 1, 4, 5) < 0.7
    allowed[1, 0, 2] = False  # a row of padding
    return 3 * torch.randn(2, HEADS, 4, 5, dtype=torch.float64), allowed


EXPECTED = {
    "softmax": ({}, lambda s, a, one: ref.softmax(s, a)),
    "softermax": ({}, lambda s, a, one: ref.softermax(s, a)),
    "softermax, no maximum": ({"softermax_use_xmax": False}, lambda s, a, one: ref.softermax(s, a)),
    "strongermax": (
        {"strongermax_strength": 3.0, "strongermax_obo": 1.5, "strongermax_divisor": 2.0},
        lambda s, a, one: ref.softmax_off_by_one(s, a, 3.0, 1.5) / 2,
    ),
    "strongermax, one learned": (
        {"strongermax_obo": 1.5, "strongermax_use_learned_obo": True},
        lambda s, a, one: ref.softmax_off_by_one(s, a, math.e, one.obo.flatten()),
    ),
    "strongermax, learned per head": (
        {"strongermax_obo": 1.5, "strongermax_use_learned_obo_per_head": True, "strongermax_use_xmax": False},
        lambda s, a, one: ref.softmax_off_by_one(s, a, math.e, one.obo.flatten()),
    ),
    "consmax": ({}, lambda s, a, one: ref.consmax(s, a, one.beta[0], one.gamma[0])),
    "consmax, base 2": (
        {"consmax_use_euler_base": False, "consmax_base": 2.0},
        lambda s, a, one: ref.consmax(s, a, one.beta[0], one.gamma[0], base=2.0),
    ),
    "consmax_v2": (
        {"consmax_v2_clamp_value": -1.0},
        lambda s, a, one: ref.consmax_v2(
            s, a, 2.5 * one.beta_factor.flatten(), 100 * one.gamma_factor.flatten(), clamp=-1.0
        ),
    ),
    "sigmoidmax": ({"sigmoidmax_divisor": 7.0}, lambda s, a, one: ref.sigmoidmax(s, a, 7.0)),
    "relumax": ({"relumax_divisor": 7.0}, lambda s, a, one: ref.relumax(s, a, 7.0)),
    "relu2max": ({"relu2max_divisor": 7.0}, lambda s, a, one: ref.relu2max(s, a, 7.0)),
    "softplus": ({"softplus_divisor": 7.0}, lambda s, a, one: ref.softplus(s, a, 7.0)),
    "squareplus": ({"squareplus_divisor": 7.0}, lambda s, a, one: ref.squareplus(s, a, 7.0)),
    "polymax": (
        {"polymax_x_intercept": -2.0, "polymax_y_intercept": 0.5, "polymax_power": 3.0, "polymax_divisor": 7.0},
        lambda s, a, one: ref.polymax(s, a, -2.0, 0.5, 3.0, 7.0),
    ),
    "sigsoftmax": ({}, lambda s, a, one: ref.sigsoftmax(s, a)),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_weights_and_gradients_are_those_of_the_formula(case):
    fields, formula = EXPECTED[case]
    one, (scores, allowed) = weighting(case.split(",")[0], **fields), scores_and_allowed()
    inputs = [scores.requires_grad_(), *one.parameters()]
    outputs = [one(scores, allowed), formula(scores, allowed, one)]
    torch.testing.assert_close(*outputs, atol=1e-12, rtol=1e-9)
    direction = torch.randn_like(scores)
    found, expected = (torch.autograd.grad((out * direction).sum(), inputs) for out in outputs)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", VARIANTS["softmax"])
def test_what_is_not_allowed_weighs_exactly_nothing_and_is_not_looked_at(name):
    one, (scores, allowed) = weighting(name), scores_and_allowed()
    hidden = ~allowed.expand_as(scores)
    expected = one(scores, allowed)
    assert (expected[hidden] == 0).all()
    for strange in (math.inf, -math.inf, math.nan, 1e300):
        changed = scores.masked_fill(hidden, strange).requires_grad_()
        found = one(changed, allowed)
        assert torch.equal(found, expected)
        found.sum().backward()
        assert (changed.grad[hidden] == 0).all()
        assert changed.grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax", "softermax", "strongermax", "sigsoftmax"])
def test_a_row_that_is_divided_by_its_sum_survives_any_size_of_scores(name):
    scores = torch.tensor([[[[-1e5, 1e5, 1e5, -3e4]], [[-2e5, -1e5, -1e5, -3e5]]]])
    weights = VARIANTS["softmax"][name](config(softmax_variant_attn=name), 0, 2)(scores, torch.tensor(True))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 0.5, 0.0]).expand_as(weights))


@pytest.mark.parametrize("name", VARIANTS["softmax"])
def test_gradients_are_those_of_finite_differences(name):
    one, (scores, allowed) = weighting(name), scores_and_allowed()
    parameters = list(one.parameters())

    def run(scores, *values):
        named = dict(zip(dict(one.named_parameters()), values, strict=True))
        return torch.func.functional_call(one, named, (scores, allowed))

    assert torch.autograd.gradcheck(run, (scores.requires_grad_(), *parameters))
