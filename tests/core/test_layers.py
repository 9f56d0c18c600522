"""Rules of the layers against `torch.func` per-sample gradients in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_gradtools.core import linear
from hf_gradtools.core.calls import LayerCall
from hf_gradtools.core.capture import find_layers
from hf_gradtools.core.layers import ElementwiseRule, EmbeddingRule, LinearRule, Rule, rule_for
from hf_gradtools.core.samples import SampleLayout
from hf_gradtools.ghost.engine import GhostDotProd


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class ShiftedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight)


class Quadratic(nn.Module):
    """A layer that no rule knows: its output is not linear in its parameters, and it has dropout of its own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 6))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, *, scale=1.0):
        return self.dropout(torch.sin(x @ self.a.square()) * scale)


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "wide_linear": (lambda: nn.Linear(6, 40, bias=False), (6,)),
    "conv1d_hf": (lambda: Conv1D(5, 6), (6,)),
    "layer_norm": (lambda: nn.LayerNorm(6), (6,)),
    "group_norm": (lambda: nn.GroupNorm(1, 7), (6,)),
    "shifted_rms_norm": (ShiftedRMSNorm, (6,)),
    "rms_norm": (lambda: nn.RMSNorm(6), (6,)),
    "conv1d": (lambda: nn.Conv1d(7, 4, 3, padding=1), (6,)),
    "conv2d": (lambda: nn.Conv2d(7, 4, 2, stride=2), (6, 4)),
    "unknown": (Quadratic, (6,)),
    "attention": (lambda: SelfAttention(), (6,)),
    "inplace": (lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (6,)),
    "twice": (lambda: Twice(), (6,)),
}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def reference(model, x, weights, target):
    """Dots and norms by vmap over samples of grad, functional and float64."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, sample, weight):
        out = torch.func.functional_call(model, parameters, (sample[None],))
        return (out * weight).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, weights)
    dots = sum((grads[n] * target[n]).flatten(1).sum(1) for n in grads)
    return dots, sum(grads[n].square().flatten(1).sum(1) for n in grads)


@pytest.mark.parametrize("method", ["auto", "takeover", "gram", "contraction"])
@pytest.mark.parametrize("kind", MODULES)
def test_dots_and_norms_of(kind, method):
    torch.manual_seed(0)
    make, features = MODULES[kind]
    model = make().double()
    x = torch.randn(4, 7, *features, dtype=torch.float64)
    weights = torch.randn(4, *model(x).shape[1:], dtype=torch.float64)
    with GhostDotProd(model, method=method, grad_norms=True, loss_fn=lambda m, v: m(v).square().mean()) as engine:
        engine.validate([torch.randn(3, 7, *features, dtype=torch.float64)])
        target = {n: engine.target(p)[0] for n, p in model.named_parameters()}
        (model(x) * weights).sum().backward()
        scores = engine.scores()
    dots, norms = reference(model, x, weights, target)
    torch.testing.assert_close(scores.dots[0], dots, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scores.sq_norms, norms, rtol=1e-8, atol=1e-10)
    assert scores.residual < 1e-10


def test_embedding_positions_and_padding_index():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe, self.row = nn.Embedding(9, 6, padding_idx=0), nn.Embedding(7, 6), nn.Embedding(7, 6)

        def forward(self, ids):
            positions = torch.arange(ids.shape[1])
            return self.wte(ids) * (1 + self.wpe(positions)) * self.row(positions[None])

    model = Model().double()
    ids = torch.randint(0, 9, (4, 7))
    weights = torch.randn(4, 7, 6, dtype=torch.float64)
    with GhostDotProd(model, grad_norms=True, loss_fn=lambda m, v: m(v).square().mean()) as engine:
        engine.validate([torch.randint(0, 9, (3, 7))])
        target = {n: engine.target(p)[0] for n, p in model.named_parameters()}
        (model(ids) * weights).sum().backward()
        scores = engine.scores()
    dots, norms = [], []
    for i in range(4):
        grads = torch.autograd.grad((model(ids[i : i + 1]) * weights[i]).sum(), list(model.parameters()))
        dots.append(sum((g * t).sum() for g, t in zip(grads, target.values(), strict=True)))
        norms.append(sum(g.square().sum() for g in grads))
    torch.testing.assert_close(scores.dots[0], torch.stack(dots), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(scores.sq_norms, torch.stack(norms), rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 4), tokens=st.integers(1, 6), inputs=st.integers(1, 9), outputs=st.integers(1, 9),
    targets=st.integers(1, 3), tile=st.integers(1, 300),
)  # fmt: skip
def test_takeover_equals_the_explicit_gradients_for_any_tile(samples, tokens, inputs, outputs, targets, tile):
    a, g = torch.randn(samples, tokens, inputs).double(), torch.randn(samples, tokens, outputs).double()
    G = torch.randn(targets, outputs, inputs).double()
    explicit = torch.einsum("nso,nsi->noi", g, a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "TILE_BYTES", tile * 8)
        patch.setattr(linear, "_SMALL_BYTES", tile)
        weight, dots, norms = linear.takeover(a, g, G, with_sq_norms=True)
    torch.testing.assert_close(weight, explicit.sum(0))
    torch.testing.assert_close(dots, torch.einsum("noi,koi->kn", explicit, G))
    torch.testing.assert_close(norms, explicit.square().sum((1, 2)))
    torch.testing.assert_close(linear.token_dots(a, g, G).sum(-1), dots)
    torch.testing.assert_close(linear.sample_sq_norms(a, g), norms)


def test_long_sums_of_one_sign_keep_their_digits():
    """A language model head: softmax gradients meet activations that are alike, so all terms add up."""
    samples, tokens, inputs, outputs = 2, 64, 32, 16_000
    a = torch.randn(samples, tokens, inputs) * 0.1 + 1
    g = torch.softmax(torch.randn(samples, tokens, outputs) * 0.01, -1)
    g[:, torch.arange(tokens), torch.randint(0, 200, (tokens,))] -= 1
    G = torch.einsum("nso,nsi->oi", g, a)[None]
    _, dots, norms = linear.takeover(a, g, G, with_sq_norms=True)
    explicit = torch.einsum("nso,nsi->noi", g.double(), a.double())
    torch.testing.assert_close(dots.double(), torch.einsum("noi,koi->kn", explicit, G.double()), rtol=2e-6, atol=0)
    torch.testing.assert_close(norms.double(), explicit.square().sum((1, 2)), rtol=2e-6, atol=0)
    torch.testing.assert_close(linear.sample_sq_norms(a, g).double(), norms.double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(linear.flat_dot(G, G), G.double().square().sum(), rtol=1e-7, atol=0)


def test_rules_follow_the_forward_not_the_class():
    rule = lambda m: type(rule_for(m, dict(m.named_parameters())))  # noqa: E731
    assert rule(nn.Linear(2, 2)) is LinearRule
    assert rule(ScaledEmbedding(3, 2)) is Rule
    assert rule(nn.Embedding(3, 2)) is EmbeddingRule
    assert rule(nn.Embedding(3, 2, max_norm=1.0)) is Rule
    assert rule(ShiftedRMSNorm()) is ElementwiseRule
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: 2 * x
    assert rule(patched) is Rule


def test_unknown_layers_are_announced_once_by_name(caplog):
    GhostDotProd(nn.Sequential(nn.Linear(2, 2), Quadratic(), Quadratic()))
    assert [r.message for r in caplog.records if "Quadratic" in r.message] == [caplog.records[-1].message]


def test_batch_statistics_are_refused():
    with pytest.raises(ValueError, match="batch normalisation mixes"):
        GhostDotProd(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_parameter_used_outside_its_module_is_noticed():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.outer = nn.Linear(4, 4)

        def forward(self, x):
            return self.outer(x @ self.inner.weight)

    model = Sneaky()
    with GhostDotProd(model, loss_fn=lambda m, v: m(v).square().mean()) as engine:
        engine.validate([torch.randn(3, 4)])
        model(torch.randn(5, 4)).square().sum().backward()
        with pytest.raises(RuntimeError, match=r"gradient of inner is not explained"):
            engine.scores()


def test_layer_that_reorders_samples_is_refused():
    class Transposing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = Transposing()
    with GhostDotProd(model, loss_fn=lambda m, v: m(v).square().mean()) as engine:
        engine.validate([torch.randn(3, 5, 4)])
        with pytest.raises(ValueError, match="layer 'inner'.*cannot be attributed"):
            model(torch.randn(3, 5, 4)).sum().backward()


def test_patterns_choose_layers_and_bring_tied_ones_along():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert [x.name for x in find_layers(model, "mid")] == ["mid"]
    assert [x.name for x in find_layers(model, ["head"])] == ["embed", "head"]
    with pytest.raises(ValueError, match=r"layers='midd' matches no module.*near matches: mid"):
        find_layers(model, "midd")


def test_segments_and_masks_agree():
    layout = SampleLayout(2, (4,), torch.tensor([[0, 0, 1, 1], [2, 2, 2, 3]]), 4)
    values = torch.randn(1, 2, 4, 3)
    by_mask = [(values[0] * layout.sample_mask(values[0], n)).sum() for n in range(4)]
    torch.testing.assert_close(layout.sum_samples(values)[0], torch.stack(by_mask))
    flat = SampleLayout(2, (4,))
    torch.testing.assert_close(flat.sum_samples(values.flatten(1, 2))[0], values[0].sum((1, 2)))


def test_half_precision_calls_are_summed_in_float32():
    a, g = torch.randn(2, 300, 8, dtype=torch.bfloat16), torch.randn(2, 300, 5, dtype=torch.bfloat16)
    target = torch.randn(1, 5, 8)
    exact = torch.einsum("nso,nsi,koi->kn", g.double(), a.double(), target.double())
    torch.testing.assert_close(linear.token_dots(a, g, target).double().sum(-1), exact, rtol=1e-4, atol=1e-3)
    layer = find_layers(nn.Linear(8, 5, bias=False))[0]
    call = LayerCall((a,), {}, (g,))
    norms = layer.rule.sq_norms(layer, call, SampleLayout(2, (300,)))
    explicit = torch.einsum("nso,nsi->noi", g.double(), a.double()).square().sum((1, 2))
    torch.testing.assert_close(norms.double(), explicit, rtol=1e-4, atol=1e-3)
