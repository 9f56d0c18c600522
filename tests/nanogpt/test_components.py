"""Parts of the model against naive references: what goes in and comes out is caught in a running model."""

from functools import partial

import pytest
import torch
from transformers.activations import ACT2FN

from hf_gradtools.nanogpt.registry import VARIANTS
from tests.nanogpt import references as ref
from tests.nanogpt.tiny import NO_POSITIONS, POSITIONS, build, config, ids


CLOSE = {"atol": 1e-10, "rtol": 1e-9}


@torch.no_grad()
def caught(one, module, **inputs):
    """First input and first output of a module while the model reads two rows."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    one(ids(2, 7), **inputs)
    handle.remove()
    x, out = seen[0]
    return x, out[0] if isinstance(out, tuple) else out


def heads(one, x, groups):
    attn = one.transformer.h[0].attn
    split = attn.c_attn(x).split([16, 4 * groups, 4 * groups], dim=-1)
    return [part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in split]


def joined(one, y):
    return one.transformer.h[0].attn.c_proj(y.transpose(1, 2).flatten(-2))


def fire_bias(one, positions=range(7)):
    fire = one.transformer.h[0].attn.biases[0]
    layers = [(m.weight, m.bias) for m in fire.mlp if isinstance(m, torch.nn.Linear)]
    return ref.fire(positions, positions, layers, fire.c[0], (fire.L_multiplier * fire.init_L).abs()[0])


ROTARY = {"use_rotary_embeddings": True}
ATTENTIONS = {
    "plain": {},
    "rotary": ROTARY,
    "rotary, other base": {**ROTARY, "rope_theta": 50.0},
    "groups of heads": {"n_kv_group": 2},
    "window": {"window_size": 3},
    "normed": {"use_qk_norm": True},
    "normed and scaled": {**ROTARY, "use_qk_norm": True, "use_qk_norm_scale": True},
    "capped": {"attn_logit_softcapping": 1.5},
    "off by one": {"use_flash_lobo": True, "flash_lobo_log_const": 0.5},
    "off by one per head": {**ROTARY, "use_flash_lobo": True, "use_flash_lobo_per_head": True},
    "off by one fixed": {"use_flash_lobo": True, "use_flash_obo_const": True, "flash_lobo_log_const": 0.7},
    "FIRE": {"use_fire_embeddings": True, "fire_init_L": 512.0},
    "FIRE of a short reach": {"use_fire_embeddings": True, "fire_init_L": 2.0},
    "everything": {**ROTARY, "use_fire_embeddings": True, "use_flash_lobo": True, "use_flash_lobo_per_head": True,
                   "attn_logit_softcapping": 1.5, "use_qk_norm": True, "n_kv_group": 2, "window_size": 4},
    "consmax, FIRE, groups": {"softmax_variant_attn": "consmax", "use_fire_embeddings": True, "n_kv_group": 2},
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_the_one_of_the_loops(case, implementation):
    fields = ATTENTIONS[case]
    one = build(**{**NO_POSITIONS, **fields})
    one.set_attn_implementation(implementation)
    attn, c = one.transformer.h[0].attn, one.config
    with torch.no_grad():
        x, found = caught(one, attn)
        q, k, v = heads(one, x, c.n_kv_group or c.n_head)
        scale = None
        if c.use_qk_norm:
            q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
        if c.use_qk_norm_scale:
            scale = attn.qk_scale.weight[0]
        if c.use_rotary_embeddings:
            q, k = (ref.rotary(t, range(7), c.rope_theta) for t in (q, k))
        weigh = ref.softmax
        if c.use_flash_lobo:
            learned = dict(attn.named_parameters()).get("off_by_one.log_const")
            weigh = partial(ref.flash_lobo, log_constant=c.flash_lobo_log_const if learned is None else learned)
        if c.softmax_variant_attn == "consmax":
            weigh = partial(ref.consmax, beta=attn.weighting.beta[0], gamma=attn.weighting.gamma[0])
        bias = fire_bias(one) if c.use_fire_embeddings else None
        allowed = ref.causal_window(7, 7, c.window_size)
        expected = joined(one, ref.attention(q, k, v, allowed, weigh, scale, c.attn_logit_softcapping, bias))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_infinite_attention_sums_heads_of_any_size():
    one = build("infinite", **NO_POSITIONS)
    attn = one.transformer.h[0].attn
    with torch.no_grad():
        x, found = caught(one, attn)
        q, k, v = (
            part.unflatten(-1, (3, -1)).transpose(1, 2) for part in attn.c_attn(x).split([3 * 6, 3 * 6, 3 * 5], dim=-1)
        )
        weights = ref.softmax((q @ k.mT) * 6**-0.5, ref.causal_window(7, 7))
        expected = attn.c_proj((weights @ v).sum(1))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("turned", [0, 4], ids=["no positions", "rotary"])
def test_latent_attention_is_that_of_the_keys_and_values_it_never_makes(turned):
    one = build("attention=mla", **NO_POSITIONS | {"use_rotary_embeddings": turned > 0}, mla_latent_dim=6)
    attn = one.transformer.h[0].attn
    with torch.no_grad():
        x, found = caught(one, attn)
        q, q_turned, latent, k_turned = attn.c_attn(x).split([16, 4 * turned, 6, turned], dim=-1)
        latent = ref.rmsnorm(latent, attn.latent_norm.weight, one.config.norm_eps)
        q, q_turned = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (q, q_turned))
        k, v = (torch.stack([latent @ w for w in each], dim=1) for each in (attn.w_k.weight.mT, attn.w_v.weight))
        if turned:
            k_turned = ref.rotary(k_turned[:, None], range(7)).expand(-1, 4, -1, -1)
            q = torch.cat([q, ref.rotary(q_turned, range(7))], dim=-1)
            k = torch.cat([k, k_turned], dim=-1)
        expected = joined(one, ref.attention(q, k, v, ref.causal_window(7, 7)))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_fire_of_a_cached_token_uses_its_absolute_place():
    """With L = 2 the distance is measured against the query's own position, which a cache must not reset."""
    one = build(**NO_POSITIONS | {"use_fire_embeddings": True, "fire_init_L": 2.0})
    fire = one.transformer.h[0].attn.biases[0]
    with torch.no_grad():
        bias = fire(torch.tensor([6]), torch.arange(7), torch.tensor([[6]]))
    torch.testing.assert_close(bias[0], fire_bias(one)[:, 6:7], **CLOSE)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm", "dact", "identity", "prmsnorm", "hyperspherenorm"])
def test_norms_are_those_of_the_formulas(name):
    one = build(norm_variant_attn=name, norm_variant_output=name, bias=True)
    norm, eps = one.transformer.ln_f, one.config.norm_eps
    x, found = caught(one, norm)
    with torch.no_grad():
        expected = {
            "rmsnorm": lambda: ref.rmsnorm(x, norm.weight, eps),
            "layernorm": lambda: ref.layernorm(x, norm.weight, norm.bias, eps),
            "dact": lambda: ref.dact(x, norm.alpha, norm.weight, norm.bias),
            "identity": lambda: x,
            "prmsnorm": lambda: ref.partial_rmsnorm(x, norm.weight, eps, 8),
            "hyperspherenorm": lambda: ref.on_sphere(x, 4.0),
        }[name]()
    torch.testing.assert_close(found, expected, **CLOSE)


def test_rmsnorm_of_zeros_is_zero():
    norm = VARIANTS["norm"]["rmsnorm"](config(), 4)
    assert torch.equal(norm(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("act", [None, "relu"])
def test_swiglu_gates(act):
    one = build("mlp=swiglu", activation_variant=act)
    mlp = one.transformer.h[0].mlp
    x, found = caught(one, mlp)
    function = ref.silu if act is None else torch.relu
    with torch.no_grad():
        expected = ref.swiglu(x, mlp.c_gate.weight, mlp.c_fc.weight, mlp.c_proj.weight, function)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("order", [1, 3, 4])
def test_kan_adds_legendre_polynomials_of_each_number(order):
    one = build("mlp=kan", kan_poly_order=order, kan_middle_layers=[6])
    mlp = one.transformer.h[0].mlp
    x, found = caught(one, mlp)
    assert len(mlp.layers) == 2
    with torch.no_grad():
        y = x
        for layer in mlp.layers:
            poly = layer.poly.weight.unflatten(-1, (-1, order + 1))
            y = ref.kan_layer(y, layer.base.weight, poly, layer.norm.weight, layer.norm.bias, one.config.norm_eps)
    torch.testing.assert_close(found, y, **CLOSE)


@pytest.mark.parametrize("name", [name for name in ACT2FN if name not in ("rrelu",)])
def test_activations_of_transformers_are_its_own(name):
    ours, theirs = VARIANTS["activation"][name](config(), 0), ACT2FN[name].float()  # xielu is made in bfloat16
    x = torch.randn(5, 7)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_squared_relu_squares():
    found = VARIANTS["activation"]["squared_relu"](config(), 0)(torch.tensor([-2.0, 0.0, 3.0]))
    assert found.tolist() == [0.0, 0.0, 9.0]


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_tell_the_order_of_tokens(name):
    """Without any, tokens that go before are a set: their order does not matter to the one after them."""
    swapped = ids(1, 6)[:, [1, 0, 2, 3, 4, 5]]
    for flags, matters in (({}, False), ({f"use_{name}_embeddings": True}, True)):
        one = build(n_layer=1, **NO_POSITIONS | flags)
        with torch.no_grad():
            difference = (one(ids(1, 6)).logits - one(swapped).logits)[:, 2:].abs().max()
        assert (difference > 1e-6) == matters


# ---- linear maps of few bits


def test_ternary_linear_uses_three_values_and_8_bit_inputs():
    linear = VARIANTS["linear"]["bitlinear_1p58"](config(), 6, 5, False).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    mean = linear.weight.abs().mean()
    weight = torch.tensor([[max(-1, min(1, round((w / mean).item()))) for w in row] for row in linear.weight]) * mean
    levels = [[round((a / row.abs().max() * 127).item()) for a in row] for row in x]
    inputs = torch.tensor(levels, dtype=torch.float64) * x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(linear(x), inputs @ weight.T, **CLOSE)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_linear_rounds_each_output_by_its_own_scale(bits):
    linear = VARIANTS["linear"]["quantized_linear"](config(quantize_linear_bits=bits), 6, 5, False).double()
    x, top = torch.randn(4, 6, dtype=torch.float64), 2 ** (bits - 1) - 1
    rows = []
    for row in linear.weight:
        scale = row.abs().max() / top
        rows.append(torch.stack([round((w / scale).item()) * scale for w in row]))
    torch.testing.assert_close(linear(x), x @ torch.stack(rows).T, **CLOSE)


@pytest.mark.parametrize("name", ["bitlinear_1p58", "quantized_linear"])
def test_rounding_passes_its_gradient_straight_through(name):
    linear = VARIANTS["linear"][name](config(quantize_linear_bits=3), 6, 5, False).double()
    x, direction = torch.randn(4, 6, dtype=torch.float64).requires_grad_(), torch.randn(4, 5, dtype=torch.float64)
    (linear(x) * direction).sum().backward()
    rounded = linear(torch.eye(6, dtype=torch.float64)).detach().T  # a unit vector is not changed by its rounding
    torch.testing.assert_close(x.grad, direction @ rounded, **CLOSE)
    assert linear.weight.grad.abs().min() > 0
