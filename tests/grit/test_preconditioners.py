"""Preconditioners against the Fisher matrix itself, rank-SOAP against Adam written out in the Fisher eigenbasis."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_gradtools import GritConfig, GritController
from hf_gradtools.core.curvature import damped_inverse, eigenbasis
from tests.grit.reference import adapted, batch, gap, rows


class OneLayer(nn.Module):
    """A linear map whose loss has a given output gradient for each token."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x, output_grads):
        return (self.linear(x) * output_grads).sum()


def one_layer(d_in, d_out, rank=3, symmetric=False, **options):
    torch.manual_seed(0)
    config = GritConfig(
        r=rank, lora_alpha=rank, target_modules=["linear"], kfac_min_samples=1, grafting=False, reprojection=None,
        kfac_damping=0.1, **options,
    )  # fmt: skip
    model = get_peft_model(OneLayer(d_in, d_out), config).double()
    layer = model.base_model.layers()[0]
    layer.A.data = torch.randn(rank, d_in).double()
    layer.B.data = layer.A.data.mT.clone() if symmetric else torch.randn(d_out, rank).double()
    return model, layer


def factorial_tokens(inputs, output_grads):
    """Every input with every output gradient: inputs and gradients are independent, so K-FAC is exact."""
    x = inputs.repeat_interleave(len(output_grads), 0)
    return x[None], output_grads.repeat(len(inputs), 1)[None]


def turned_gradients(model, layer, x, g):
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.0)
    with GritController(model.train(), optimizer) as controller:
        model(x, g).backward()
        raw = layer.A.grad.clone(), layer.B.grad.clone()
        controller.precondition()
    return raw, (layer.A.grad, layer.B.grad)


def exact_block_fisher(layer, x, g):
    """E[vec ∂ vec ∂ᵀ] over tokens for A and for B, entry by entry from per-token gradients."""
    s = layer.module.scaling[layer.adapter]
    x, g = x[0], g[0]
    for_a = torch.einsum("tr,ti->tri", s * g @ layer.B, x).flatten(1)
    for_b = torch.einsum("to,tr->tor", s * g, x @ layer.A.mT).flatten(1)
    return for_a.mT @ for_a / len(x), for_b.mT @ for_b / len(x)


def damped_natural(fisher, grad, damping):
    """(F + damping · mean eigenvalue)⁻¹ grad, in units of that eigenvalue."""
    mean = fisher.diagonal().mean()
    identity = torch.eye(len(fisher), dtype=fisher.dtype)
    return torch.linalg.solve(fisher / mean + damping * identity, grad.flatten()).view_as(grad)


def white(count, size, seed):
    """Vectors whose second moment is the identity."""
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(values, full_matrices=False)
    return u @ vt * count**0.5


def coloured(count, size, seed):
    values = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values * torch.linspace(0.3, 3, size).double()


def test_kfac_is_the_damped_inverse_of_the_exact_fisher():
    """∇A with white inputs and any gradients, ∇B with white gradients and any inputs: there the block Fisher is
    `I ⊗ Σ_g` and `Σ_a ⊗ I`, also with damping."""
    model, layer = one_layer(5, 4, preconditioner="kfac")
    x, g = factorial_tokens(white(9, 5, 1), coloured(7, 4, 2))
    (raw, _), (natural, _) = turned_gradients(model, layer, x, g)
    torch.testing.assert_close(
        natural, damped_natural(exact_block_fisher(layer, x, g)[0], raw, 0.1), rtol=1e-6, atol=1e-9
    )

    model, layer = one_layer(5, 4, preconditioner="kfac")
    x, g = factorial_tokens(coloured(9, 5, 1), white(7, 4, 2))
    (_, raw), (_, natural) = turned_gradients(model, layer, x, g)
    torch.testing.assert_close(
        natural, damped_natural(exact_block_fisher(layer, x, g)[1], raw, 0.1), rtol=1e-6, atol=1e-9
    )


def test_seed_pairing_is_the_inverse_where_both_factors_agree():
    """With `B = Aᵀ`, and inputs and gradients of one distribution, Σ_a = Σ_g: the swapped pairing is exact too."""
    model, layer = one_layer(5, 5, preconditioner="grit", symmetric=True)
    values = white(9, 5, 1)
    x, g = factorial_tokens(values, values)
    raw, natural = turned_gradients(model, layer, x, g)
    for fisher, before, after in zip(exact_block_fisher(layer, x, g), raw, natural, strict=True):
        torch.testing.assert_close(after, damped_natural(fisher, before, 0.1), rtol=1e-6, atol=1e-9)


def test_seed_pairing_is_the_other_factor():
    """`∇A ← Σ_a⁻¹ ∇A`, `∇B ← ∇B Σ_g⁻¹`, and so not the natural gradient in general."""
    model, layer = one_layer(5, 4, preconditioner="grit")
    x, g = factorial_tokens(white(9, 5, 1), coloured(7, 4, 2))
    raw, turned = turned_gradients(model, layer, x, g)
    a, b = x[0] @ layer.A.mT, layer.module.scaling[layer.adapter] * g[0] @ layer.B
    damped = [f / f.diagonal().mean() + 0.1 * torch.eye(3).double() for f in (a.mT @ a, b.mT @ b)]
    torch.testing.assert_close(turned[0], torch.linalg.solve(damped[0], raw[0]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(turned[1], torch.linalg.solve(damped[1], raw[1].mT).mT, rtol=1e-6, atol=1e-9)
    assert gap(turned[0], damped_natural(exact_block_fisher(layer, x, g)[0], raw[0], 0.1)) > 0.05


def test_exponent_softens():
    model, layer = one_layer(5, 4, preconditioner="kfac", kfac_exponent=0.5)
    x, g = factorial_tokens(white(9, 5, 1), coloured(7, 4, 2))
    once = turned_gradients(model, layer, x, g)[1][0]
    fisher = exact_block_fisher(layer, x, g)[0]
    model, layer = one_layer(5, 4, preconditioner="kfac", kfac_exponent=0.5)
    raw = turned_gradients(model, layer, x, g)[0][0]
    values, vectors = torch.linalg.eigh(fisher / fisher.diagonal().mean() + 0.1 * torch.eye(len(fisher)).double())
    expected = vectors @ ((vectors.mT @ raw.flatten()) * values**-0.5)
    torch.testing.assert_close(once, expected.view_as(once), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("preconditioner", "invariant"), [("kfac", True), ("grit", False)])
def test_step_of_kfac_does_not_depend_on_the_gauge(preconditioner, invariant):
    steps = []
    change = torch.tensor([[2.0, 0.3, 0.0], [0.1, 0.5, 0.2], [0.0, -0.4, 1.5]]).double()
    x, g = factorial_tokens(coloured(9, 5, 1), coloured(7, 4, 2))
    for matrix in (torch.eye(3).double(), change):
        model, layer = one_layer(5, 4, preconditioner=preconditioner)
        model.peft_config["default"].kfac_damping = 1e-12
        layer.A.data = matrix @ layer.A.data
        layer.B.data = layer.B.data @ torch.linalg.inv(matrix)
        _, (for_a, for_b) = turned_gradients(model, layer, x, g)
        a, b = x[0] @ layer.A.mT, g[0] @ layer.B
        # The factors are taken relative to their mean eigenvalue; undo that, which is no part of the step's direction.
        for_a, for_b = for_a / (b.square().sum() / len(b) / 3), for_b / (a.square().sum() / len(a) / 3)
        steps.append(layer.B @ for_a + for_b @ layer.A)
    assert (gap(steps[0], steps[1]) < 1e-8) == invariant


def test_grafting_keeps_the_norm():
    model, layer = one_layer(5, 4, preconditioner="kfac")
    model.peft_config["default"].grafting = True
    raw, turned = turned_gradients(model, layer, *factorial_tokens(coloured(9, 5, 1), coloured(7, 4, 2)))
    for before, after in zip(raw, turned, strict=True):
        torch.testing.assert_close(before.norm(), after.norm())
        assert gap(before, after) > 0.05


def keep(seen, name, module, args, output):
    seen[name] = [output.detach()]
    output.register_hook(seen[name].append)


def naive_rank_soap(model, batches, lr, weight_decay, update_freq, betas=(0.9, 0.999), eps=1e-8):
    """Adam on `U_gᵀ ∇A` and `∇B U_a`, turned back; moments re-expressed whenever the bases change."""
    controller_free = copy.deepcopy(model).train()
    layers = controller_free.base_model.layers()
    sums = {x.name: torch.zeros(2, x.rank, x.rank).double() for x in layers}
    weight, state = 0.0, {x.name: None for x in layers}
    for step, inputs in enumerate(batches):
        seen = {}
        handles = []
        for layer in layers:
            handles.append(layer.down.register_forward_hook(partial(keep, seen, layer.name)))
        controller_free(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
        labels = (inputs["labels"][:, 1:] != -100).sum()
        weight = 0.95 * weight + 0.05
        for layer in layers:
            a, b = (t.flatten(0, 1) for t in seen[layer.name])
            new = torch.stack([a.mT @ a, b.mT @ b * labels**2]) / len(a)
            sums[layer.name] = 0.95 * sums[layer.name] + 0.05 * new
            if step % update_freq == 0:
                bases = eigenbasis(sums[layer.name] / weight)[1]
                if state[layer.name] is None:
                    zero = [torch.zeros_like(p) for p in (layer.A, layer.A, layer.B, layer.B)]
                    state[layer.name] = [bases, *zero]
                old, *moments = state[layer.name]
                up, down = bases[0].mT @ old[0], bases[1].mT @ old[1]
                moments[0], moments[1] = down @ moments[0], down**2 @ moments[1]
                moments[2], moments[3] = moments[2] @ up.mT, moments[3] @ (up**2).mT
                state[layer.name] = [bases, *moments]
            bases, m_a, v_a, m_b, v_b = state[layer.name]
            grads = bases[1].mT @ layer.A.grad, layer.B.grad @ bases[0]
            for p, g, m, v in zip((layer.A, layer.B), grads, (m_a, m_b), (v_a, v_b), strict=True):
                m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
                v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
                update = m / (1 - betas[0] ** (step + 1)) / ((v / (1 - betas[1] ** (step + 1))).sqrt() + eps)
                update = bases[1] @ update if p is layer.A else update @ bases[0].mT
                p.data = p.data * (1 - lr * weight_decay) - lr * update
                p.grad = None
    return controller_free


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rank_soap_is_adam_in_the_fisher_eigenbasis(weight_decay):
    model = adapted(grit_cov_update_freq=1, kfac_update_freq=3, reprojection=None, kfac_min_samples=1).double()
    data = rows(16)
    batches = [batch(data, 4 * (i % 4), 4 * (i % 4) + 4) for i in range(8)]
    expected = naive_rank_soap(model, batches, 1e-2, weight_decay, 3)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=weight_decay
    )
    with GritController(model.train(), optimizer):
        for inputs in batches:
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, naive in zip(model.base_model.layers(), expected.base_model.layers(), strict=True):
        assert gap(mine.A, naive.A) < 1e-8
        assert gap(mine.B, naive.B) < 1e-8


def test_rank_soap_with_plain_sgd_is_plain_sgd():
    """A rotation there and back: only an optimizer that treats coordinates differently notices."""
    results = []
    for preconditioner in ("rank_soap", None):
        model = adapted(preconditioner=preconditioner, reprojection=None).double().train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        with GritController(model, optimizer):
            for _ in range(5):
                model(**batch(rows(4))).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append([p for layer in model.base_model.layers() for p in (layer.A, layer.B)])
    assert max(gap(x, y) for x, y in zip(*results, strict=True)) < 1e-10


def test_rotation_does_not_eat_half_precision_parameters():
    """Only the step is rotated: with a learning rate of zero nothing moves, however many steps are taken."""
    model = adapted(reprojection=None).to(torch.bfloat16).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.1)
    with GritController(model, optimizer):
        for _ in range(3):
            model(**batch(rows(4))).loss.backward()
            optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_warmup_and_missing_samples_leave_gradients_alone():
    for options in ({"ng_warmup_steps": 3}, {"kfac_min_samples": 10_000}):
        model = adapted(preconditioner="kfac", **options).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with GritController(model, optimizer) as controller:
            model(**batch(rows(4))).loss.backward()
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            controller.precondition()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_failed_inversion_keeps_the_last_basis_and_is_counted(caplog):
    model = adapted(preconditioner="kfac", kfac_update_freq=1).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model, optimizer) as controller:
        model(**batch(rows(8))).loss.backward()
        optimizer.step()
        name = controller.layers[0].name
        kept = controller.bases[name].clone()
        controller.fishers[name].average[0] = -torch.eye(6)
        controller.refresh()
        assert torch.equal(controller.bases[name], kept)
    assert controller.failed_inversions == 1
    assert "could not be inverted" in caplog.text


def test_regularisers_by_autograd():
    from hf_gradtools.grit.regularizers import curvature_energy, projection_distance

    torch.manual_seed(0)
    A, B = (torch.randn(*s).double().requires_grad_() for s in ((3, 5), (4, 3)))  # noqa: N806
    root = torch.randn(2, 3, 3).double()
    activation, gradient = root @ root.mT
    pairs = [(curvature_energy, (activation, gradient)), (projection_distance, (root[0], root[1]))]
    for energy, matrices in pairs:
        value, to_a, to_b = energy(A, B, *matrices)
        expected = torch.autograd.grad(value, (A, B))
        torch.testing.assert_close((to_a, to_b), expected)
    outputs = torch.einsum("or,tr->to", B, torch.linalg.cholesky(activation).mT)
    backs = torch.einsum("ri,tr->ti", A, torch.linalg.cholesky(gradient).mT)
    torch.testing.assert_close(
        curvature_energy(A, B, activation, gradient)[0], outputs.square().sum() + backs.square().sum()
    )


def test_regularisers_reach_the_gradients_and_ramp_up():
    grads = {}
    for weight in (0.0, 1e-2):
        model = adapted(preconditioner=None, lambda_kfac=weight, regularizer_warmup_steps=4).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with GritController(model, optimizer) as controller:
            model(**batch(rows(8))).loss.backward()
            controller.precondition()
        layer = controller.layers[0]
        grads[weight] = layer.B.grad.clone()
    added = 0.25 * 1e-2 * 2 * layer.B @ controller.fishers[layer.name].factors[0]
    torch.testing.assert_close(grads[1e-2] - grads[0.0], added, rtol=1e-3, atol=1e-6)
    assert controller.figures["loss_kfac"] > 0


def softmax_adapter(seed, tokens=60, d_in=8, d_out=6, rank=3):
    """Directions on a toy with its exact block Fisher: softmax regression `(W + B A) x`, labels of the model's own.

    Returns {"A" | "B": (exact natural gradient, K-FAC's pairing, the seed's pairing)}.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([2.0**-i for i in range(d_in)])
    x = torch.randn(tokens, d_in, generator=generator).double() * scales
    W, A, B = (torch.randn(*s, generator=generator).double() for s in ((d_out, d_in), (rank, d_in), (d_out, rank)))  # noqa: N806
    p = ((W + B @ A) @ x.mT).mT.softmax(-1)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    # Output gradients of every token under every label, weighted by the label's probability.
    g = p[:, None] - torch.eye(d_out).double()
    a, b = x @ A.mT, g @ B
    chosen = torch.arange(tokens), labels
    grads = {"A": b[chosen].mT @ x / tokens, "B": g[chosen].mT @ a / tokens}
    per_token = {"A": torch.einsum("ncr,ni->ncri", b, x), "B": torch.einsum("nco,nr->ncor", g, a)}
    factors = {"a": a.mT @ a / tokens, "g": torch.einsum("nc,ncr,ncs->rs", p, b, b) / tokens}
    inverse = {k: damped_inverse(f, 1e-3)[0] for k, f in factors.items()}
    directions = {}
    for letter, grad in grads.items():
        flat = per_token[letter].flatten(2)
        fisher = torch.einsum("nc,nck,ncl->kl", p, flat, flat) / tokens
        exact = damped_natural(fisher, grad, 1e-3)
        right, swapped = ("g", "a") if letter == "A" else ("a", "g")
        pairings = [inverse[k] @ grad if letter == "A" else grad @ inverse[k] for k in (right, swapped)]
        directions[letter] = exact, *pairings
    return directions


def test_kfac_pairing_is_nearer_to_the_natural_gradient_than_the_seeds():
    """On 50 problems with their exact Fisher, for both matrices; and close for B."""
    cosines = {"A": [], "B": []}
    for seed in range(50):
        for letter, (exact, *pairings) in softmax_adapter(seed).items():
            flat = [torch.cosine_similarity(exact.flatten(), x.flatten(), dim=0) for x in pairings]
            cosines[letter].append(torch.stack(flat))
    for letter, rows_ in cosines.items():
        kfac, seed = torch.stack(rows_).unbind(1)
        assert (kfac > seed).sum() >= 45, letter
        assert kfac.mean() > 1.5 * seed.mean(), letter
    assert torch.stack(cosines["B"])[:, 0].mean() >= 0.85
