"""The module against the dense autoencoders of dense_sae.py: every number and every gradient."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from hf_gradtools.sae import sparse
from hf_gradtools.sae.activations import jump_relu, step
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.modeling_sae import SAE
from tests.sae import dense_sae


N, D, F = 13, 6, 20
CASES: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "topk of all": {"activation": "topk", "k": F},
    "topk, not centred": {"activation": "topk", "apply_b_dec_to_input": False},
    "topk, matryoshka": {"activation": "topk", "matryoshka_widths": (5, 12, F)},
    "topk with l1": {"activation": "topk", "sparsity_penalty": "l1", "sparsity_coefficient": 0.1},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk, not centred": {"activation": "batchtopk", "apply_b_dec_to_input": False},
    "batchtopk, matryoshka": {"activation": "batchtopk", "matryoshka_widths": (1, F)},
    "relu": {"activation": "relu", "sparsity_coefficient": 0.1},
    "relu, not centred": {"activation": "relu", "apply_b_dec_to_input": False},
    "relu, matryoshka": {"activation": "relu", "matryoshka_widths": (7, F), "sparsity_coefficient": 0.1},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.5, "sparsity_coefficient": 0.1},
    "jumprelu, shared": {"activation": "jumprelu", "bandwidth": 0.5, "shared_threshold": True},
    "jumprelu with l1": {"activation": "jumprelu", "bandwidth": 0.5, "sparsity_penalty": "l1"},
    "jumprelu, matryoshka": {"activation": "jumprelu", "bandwidth": 0.5, "matryoshka_widths": (7, F)},
    "gated": {"activation": "gated", "sparsity_coefficient": 0.1},
    "gated, not centred": {"activation": "gated", "apply_b_dec_to_input": False},
}
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")


@pytest.fixture(params=["gathered", "dense"])
def way(request, monkeypatch):
    monkeypatch.setattr(sparse, "DENSE_ABOVE", 2.0 if request.param == "gathered" else -1.0)


def make_sae(dtype: torch.dtype = torch.float64, **options: Any) -> SAE:
    """One whose every parameter matters: none is zero, and rows of the decoder have different lengths."""
    generator = torch.Generator().manual_seed(3)
    sae = SAE(SAEConfig(**{"d_in": D, "d_sae": F, "k": 3, "auxk_coefficient": 0.5, **options}), seed=0).to(dtype)
    with torch.no_grad():
        for name, tensor in sorted(sae.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator).to(dtype)
            tensor.copy_(0.3 + 0.2 * noise.abs() if name == "threshold" else tensor + 0.2 * noise)
    return sae


def make_x(dtype: torch.dtype = torch.float64, tokens: int = N) -> torch.Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(4)).to(dtype)


def assert_same(sae: SAE, x: torch.Tensor, dead: torch.Tensor | None, tolerance: float) -> None:
    """Of all outputs, and of the gradients of a function of all of them by every parameter and x."""
    near = {"atol": tolerance, "rtol": tolerance}
    x = x.requires_grad_()
    ours, dense = sae(x, dead=dead), dense_sae.forward(sae, x, dead)
    for name in ("loss", "reconstruction", "mse", "sparsity", "auxk"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name), **near)
    torch.testing.assert_close(ours.latents.dense(), dense.latents, **near)
    assert float(ours.l0) == pytest.approx(float((dense.latents > 0).sum(1).double().mean()))
    error, variance = (x - dense.reconstruction).detach().square().sum(), (x - x.mean(0)).detach().square().sum()
    assert float(ours.fvu) == pytest.approx(float(error / variance), rel=1e-4)

    wanted = dict(sae.named_parameters()) | {"x": x}
    probes = torch.randn_like(x), torch.randn(len(x), F).to(x)
    mine, reference = (
        torch.autograd.grad(
            loss + (reconstruction * probes[0]).sum() + (latents * probes[1]).sum(), list(wanted.values())
        )
        for loss, reconstruction, latents in (
            (ours.loss, ours.reconstruction, ours.latents.dense()),
            (dense.loss, dense.reconstruction, dense.latents),
        )
    )
    for name, one, other in zip(wanted, mine, reference, strict=True):
        assert other.abs().max() > 1e-3, f"the test shows nothing about {name}"
        torch.testing.assert_close(one, other, **near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_are_those_of_the_dense_form(case, dtype, way):
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[1, 4, 5, 11, 17]] = True  # more than auxk = D // 2 takes
    few = torch.arange(F) == 8  # and fewer
    for chosen in (None, dead, few):
        assert_same(make_sae(dtype, **CASES[case]), make_x(dtype), chosen, 1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_in_evaluation_too(case):
    sae = make_sae(**CASES[case]).eval()
    x = make_x()
    if not case.startswith("jumprelu"):  # its thresholds get their gradient in training alone
        assert_same(sae, x, None, 1e-11)
    with torch.no_grad():
        output, dense = sae(x), dense_sae.forward(sae, x)
    torch.testing.assert_close(output.reconstruction, dense.reconstruction)
    torch.testing.assert_close(sae.encode(x), dense.latents)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), dense.reconstruction)
    torch.testing.assert_close(sae.decode(dense.latents), dense.reconstruction)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_very_small_batches(activation, tokens):
    sae = make_sae(activation=activation, bandwidth=2.0)
    dead = torch.ones(F, dtype=torch.bool)
    ours, dense = sae(make_x(tokens=tokens), dead=dead), dense_sae.forward(sae, make_x(tokens=tokens), dead)
    torch.testing.assert_close(ours.loss, dense.loss)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    grads = [torch.autograd.grad(output.loss, parameters, allow_unused=True) for output in (ours, dense)]
    for name, mine, reference in zip(names, *grads, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if reference is None else reference, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_shape_before_the_width_is_kept(activation):
    sae, x = make_sae(activation=activation).eval(), make_x(tokens=12)
    flat = sae.encode(x)
    for shape in ((3, 4), (12,), (2, 1, 6)):
        torch.testing.assert_close(sae.encode(x.view(*shape, D)), flat.view(*shape, F))
        assert sae(x.view(*shape, D)).reconstruction.shape == (*shape, D)
    torch.testing.assert_close(sae.encode(x[0]), flat[0])
    assert sae(x[0]).reconstruction.shape == (D,)
    assert sae.encode(x[:0]).shape == (0, F)
    torch.testing.assert_close(sae.encode(x.T.contiguous().T), flat)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_that_is_not_a_number_shows_and_stays_alone(activation):
    sae, x = make_sae(torch.float32, activation=activation).eval(), make_x(torch.float32)
    expected = sae.encode(x)
    x[2, 1] = torch.nan
    latents = sae.encode(x)
    assert latents[2].isnan().any()
    others = torch.arange(N) != 2
    torch.testing.assert_close(latents[others], expected[others], rtol=0, atol=0)
    assert sae(x).loss.isnan()


def test_bad_input_is_named():
    sae = SAE(SAEConfig(D, F, k=3, hookpoint="layers.5", model_name="gpt2"))
    with pytest.raises(
        ValueError, match=r"x has shape \[2, 7\].*width d_in=6, the hidden states at 'layers.5' of gpt2"
    ):
        sae(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        sae.encode(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x has shape \[0, 6\], no tokens"):
        sae(torch.zeros(0, D))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale="):
            sae.fold_scale_(scale)
    with pytest.raises(ValueError, match="auxk=0 must be at least 1. Pass auxk_coefficient=0"):
        SAEConfig(D, F, k=3, auxk=0)


def test_gradients_are_not_differentiable_again():
    x = make_x().requires_grad_()
    (grad,) = torch.autograd.grad(make_sae()(x).loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- straight-through estimates


def test_the_thresholds_gradients_are_the_papers():
    values = torch.tensor([0.4, 0.56, 0.64, 0.9, 0.76, 0.2], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((6,), 0.6, dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    near = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # within 0.1 of 0.6
    above = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)

    jumped = jump_relu(values, threshold, 0.2)
    torch.testing.assert_close(jumped, values * above)
    by_values, by_threshold = torch.autograd.grad(jumped, (values, threshold), grad)
    torch.testing.assert_close(by_values, grad * above)
    torch.testing.assert_close(by_threshold, -grad * 0.6 / 0.2 * near)

    stepped = step(values, threshold, 0.2)
    torch.testing.assert_close(stepped, above)
    by_values, by_threshold = torch.autograd.grad(stepped, (values, threshold), grad, allow_unused=True)
    assert by_values is None
    torch.testing.assert_close(by_threshold, -grad / 0.2 * near)


# ---- half precision


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_close_to_float32(activation, autocast):
    """bfloat16 has 8 bits: rounding moves each factor and sum by at most 2^-8 of itself, so that losses move by a
    percent. Single latents change wholly where that changes their rank or gate, but gradients' directions little."""
    torch.manual_seed(0)
    exact = SAE(SAEConfig(32, 128, activation, k=8, bandwidth=0.5), seed=1)
    rounded = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).bfloat16()
    x, dead = torch.randn(64, 32), torch.arange(128) < 20
    expected = exact(x, dead=dead)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = rounded(x, dead=dead)
    assert output.reconstruction.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    for name in ("loss", "mse", "sparsity", "auxk", "fvu", "l0"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=0.02, atol=1e-3)
    expected.loss.backward()
    output.loss.backward()
    for (name, mine), reference in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype
        cosine = torch.cosine_similarity(mine.grad.float().flatten(), reference.grad.flatten(), dim=0)
        assert cosine > 0.97, f"{name}: {cosine}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_of_an_autocast_encoder_decode_outside_of_it(activation):
    sae = make_sae(torch.float32, activation=activation).eval()
    with torch.autocast("cpu", torch.bfloat16):
        latents = sae.encode_sparse(make_x(torch.float32))
    assert sae.decode(latents).dtype == torch.float32


# ---- modules among modules


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_copies_compute_the_same(activation):
    sae, x = make_sae(activation=activation), make_x()
    expected = sae(x).loss
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        torch.testing.assert_close(twin(x).loss, expected, rtol=0, atol=0)
        twin.W_dec.data.zero_()
    torch.testing.assert_close(sae(x).loss, expected, rtol=0, atol=0)


def test_a_seed_draws_the_same_weights_and_leaves_torchs_generator_alone():
    state = torch.get_rng_state()
    one, other = (SAE(SAEConfig(D, F, k=3), seed=5) for _ in range(2))
    assert torch.equal(one.W_enc, other.W_enc)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.W_enc, SAE(SAEConfig(D, F, k=3), seed=6).W_enc)


def test_k_can_be_larger_for_a_while():
    sae, x = make_sae(), make_x()
    sae.annealed_k = 7
    torch.testing.assert_close(sae.encode(x), make_sae(k=7).encode(x))
    sae.annealed_k = None
    torch.testing.assert_close(sae.encode(x), make_sae(k=3).encode(x))
