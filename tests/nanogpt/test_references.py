"""The naive references are right where torch has the same thing."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import FalconMambaConfig, FalconMambaModel

from tests.nanogpt import references as ref


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("base", [math.e, 2.0])
def test_powers_over_their_sum_are_a_softmax_to_that_base(base):
    scores, allowed = draw(2, 2, 4, 4), ref.causal_window(4, 4)
    expected = F.softmax((scores * math.log(base)).masked_fill(~allowed, -math.inf), dim=-1)
    torch.testing.assert_close(ref.softmax_off_by_one(scores, allowed, base, 0.0), expected)


def test_off_by_one_is_a_sink_with_a_score_of_its_own():
    scores, allowed, constant = draw(1, 2, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool), draw(2)
    with_sink = torch.cat([scores, constant.view(1, 2, 1, 1).expand(1, 2, 3, 1)], dim=-1)
    torch.testing.assert_close(ref.flash_lobo(scores, allowed, constant), F.softmax(with_sink, dim=-1)[..., :-1])


def test_a_row_without_keys_weighs_nothing():
    allowed = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert (ref.softermax(draw(1, 1, 2, 2), allowed) == 0).all()


def test_attention_is_sdpa_with_groups_of_heads():
    q, k, v = draw(2, 4, 5, 6), draw(2, 2, 5, 6), draw(2, 2, 5, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ref.attention(q, k, v, ref.causal_window(5, 5)), expected)


def test_a_window_of_two_sees_the_token_and_the_one_before():
    assert ref.causal_window(2, 4, window=2)[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]


def test_linear_attention_is_a_causal_average_by_kernel():
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 5, 4), draw(1, 2, 5, 3)
    weights = torch.einsum("bhid,bhjd->bhij", F.elu(q) + 1, F.elu(k) + 1).tril()
    torch.testing.assert_close(ref.linear_attention(q, k, v), weights / weights.sum(-1, keepdim=True) @ v)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = draw(1, 1, 1, 8), draw(1, 1, 1, 8)
    near = (ref.rotary(q, [5]) * ref.rotary(k, [2])).sum()
    far = (ref.rotary(q, [105]) * ref.rotary(k, [102])).sum()
    torch.testing.assert_close(near, far)


def test_norms_are_those_of_torch():
    x, weight, bias = draw(3, 7), draw(7), draw(7)
    torch.testing.assert_close(ref.layernorm(x, weight, bias, 1e-5), F.layer_norm(x, (7,), weight, bias, 1e-5))
    torch.testing.assert_close(ref.rmsnorm(x, weight, 1e-5), F.rms_norm(x, (7,), weight, 1e-5))
    torch.testing.assert_close(ref.dact(x, weight[:1], weight, bias), weight * torch.tanh(weight[:1] * x) + bias)
    torch.testing.assert_close(ref.silu(x), F.silu(x))


@pytest.mark.parametrize(
    ("degree", "closed"),
    [(0, lambda x: x**0), (2, lambda x: (3 * x**2 - 1) / 2), (3, lambda x: (5 * x**3 - 3 * x) / 2)],
)
def test_legendre_polynomials_are_those_of_the_tables(degree, closed):
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(ref.legendre(x, degree), closed(x))


def test_state_space_is_that_of_falcon_mamba_before_its_last_norm():
    size, rank, states, taps, eps = 6, 3, 4, 3, 1e-5
    config = FalconMambaConfig(
        hidden_size=size, expand=1, state_size=states, time_step_rank=rank, conv_kernel=taps, mixer_rms_eps=eps,
        num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    mixer = FalconMambaModel(config).layers[0].mixer.double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mixer.out_proj.weight.data = torch.eye(size, dtype=torch.float64)
    x, one = draw(2, 5, size), torch.ones(size, dtype=torch.float64)
    p = {
        "in_proj": mixer.in_proj.weight, "conv_weight": mixer.conv1d.weight[:, 0], "conv_bias": mixer.conv1d.bias,
        "x_proj": mixer.x_proj.weight, "dt_norm": one[:rank], "b_norm": one[:states], "c_norm": one[:states],
        "dt_proj": mixer.dt_proj.weight, "dt_bias": mixer.dt_proj.bias, "A_log": mixer.A_log, "D": mixer.D,
        "out_norm": one, "out_proj": mixer.out_proj.weight,
    }  # fmt: skip
    expected = ref.rmsnorm(mixer(x), one, eps)
    torch.testing.assert_close(ref.ssm(x, p, eps), expected, atol=1e-5, rtol=1e-5)  # it holds the state in float32
