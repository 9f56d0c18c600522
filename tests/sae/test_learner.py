"""A step of training against plain dense PyTorch, and what training promises of every step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.learner import Learner
from hf_gradtools.sae.training_config import SAETrainingConfig
from tests.sae.sources import correlated


D_IN, D_SAE, TOKENS, STEPS = 8, 24, 64, 6
CPU = torch.device("cpu")
CONFIGS = {
    "topk": SAEConfig(D_IN, D_SAE, k=4, auxk=3),
    "relu": SAEConfig(D_IN, D_SAE, "relu", sparsity_coefficient=0.05),
    "gated": SAEConfig(D_IN, D_SAE, "gated", sparsity_coefficient=0.05),
    "jumprelu": SAEConfig(D_IN, D_SAE, "jumprelu", sparsity_coefficient=0.05, bandwidth=0.5),
    "batchtopk": SAEConfig(D_IN, D_SAE, "batchtopk", k=4),
    "matryoshka": SAEConfig(D_IN, D_SAE, k=4, matryoshka_widths=(6, 24)),
}


def training(**changes):
    return SAETrainingConfig("unused", **{"batch_tokens": TOKENS, "learning_rate": 1e-2, **changes})


def learner_of(config, args=None, x=None, num_steps=STEPS):
    learner = Learner(config, args or training(), num_steps, CPU)
    learner.calibrate(correlated(256, D_IN) if x is None else x)
    return learner


def batches(count=STEPS):
    return correlated(count * TOKENS, D_IN, seed=0).split(TOKENS)


def dense_latents(weights, x, config, k):
    """All latents `[N, F]`, and what the penalty of the activation counts."""
    linear = (x - weights["b_dec"]) @ weights["W_enc"].T
    pre = linear + weights["b_enc"]
    if config.activation == "topk":
        return torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0) * pre.relu(), None
    if config.activation == "relu":
        return pre.relu(), pre.relu()
    gates = pre.relu()
    return (linear * weights["r_mag"].exp() + weights["b_mag"]).relu() * (gates > 0), gates


def dense_loss(weights, x, config, k, dead, sparsity_weight):
    latents, penalised = dense_latents(weights, x, config, k)
    reconstruction = latents @ weights["W_dec"] + weights["b_dec"]
    loss = ((x - reconstruction) ** 2).mean()
    if penalised is not None:
        norms = weights["W_dec"].norm(dim=1)
        loss = loss + sparsity_weight * config.sparsity_coefficient * (penalised * norms).sum(1).mean()
    if config.activation == "gated":
        by_gates = penalised @ weights["W_dec"].detach() + weights["b_dec"].detach()
        loss = loss + ((x - by_gates) ** 2).mean()
    if dead.any():
        pre = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"])[:, dead]
        wanted = config.auxk or D_IN // 2
        taken = min(wanted, pre.shape[1])
        chosen = torch.zeros_like(pre).scatter(1, pre.topk(taken).indices, 1.0) * pre
        error = (x - reconstruction).detach() - chosen @ weights["W_dec"][dead]
        loss = loss + config.auxk_coefficient * (error**2).mean() * taken / wanted
    return loss, (latents > 0).any(0)


def dense_training(learner, args, num_steps):
    """The same steps with torch.optim.Adam, from the learner's state; returns weights and counters."""
    config, scale = learner.sae.config, learner.scale
    weights = {name: value.detach().clone().requires_grad_() for name, value in learner.sae.named_parameters()}
    adam = torch.optim.Adam(weights.values(), lr=1.0)
    idle = torch.zeros(D_SAE, dtype=torch.long)
    for step, x in enumerate(batches()):
        share = step / num_steps
        rise = min(1.0, (step + 1) / (args.warmup_fraction * num_steps))
        fall = 1.0 if share <= args.decay_start else (1 - share) / (1 - args.decay_start)
        adam.param_groups[0]["lr"] = args.learning_rate * rise * fall
        left = max(0.0, 1 - share / args.k_annealing_fraction)
        k = round(config.k + ((args.k_start or config.k) - config.k) * left)
        sparsity_weight = min(1.0, share / args.sparsity_warmup_fraction)
        loss, active = dense_loss(weights, x * scale, config, k, idle >= args.dead_after_tokens, sparsity_weight)
        adam.zero_grad()
        loss.backward()
        if args.max_grad_norm:
            norm = torch.cat([weight.grad.flatten() for weight in weights.values()]).norm()
            for weight in weights.values():
                weight.grad *= min(1.0, args.max_grad_norm / (float(norm) + 1e-6))
        W_dec = weights["W_dec"]
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.detach()
        adam.step()
        W_dec.data = F.normalize(W_dec.data, dim=1)
        idle = torch.where(active, 0, idle + len(x))
    return weights, idle


@pytest.mark.parametrize("activation", ["topk", "relu", "gated"])
def test_steps_equal_those_of_dense_pytorch(activation):
    options = {"max_grad_norm": 0.3, "dead_after_tokens": 2 * TOKENS, "warmup_fraction": 0.5, "decay_start": 0.4}
    args = training(**options, k_start=9, k_annealing_fraction=0.5, sparsity_warmup_fraction=0.5)
    config = dataclasses.replace(CONFIGS[activation], k=2)
    learner = learner_of(config, args)
    with torch.no_grad():
        learner.sae.b_enc[:6] = -3.0  # so that some are dead
    expected, idle = dense_training(learner, args, STEPS)
    outputs = [learner.take_step(x) for x in batches()]
    for name, weight in learner.sae.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(learner.tokens_since_active, idle)
    if activation == "topk":  # otherwise nothing here has been tested
        assert any(float(output.auxk.detach()) > 0 for output in outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_finished_autoencoder_is_the_trained_one_of_scaled_inputs(name):
    learner = learner_of(CONFIGS[name])
    for x in batches():
        learner.take_step(x)
    assert not 0.5 < learner.scale < 2
    finished, x = learner.finished(), batches()[0]
    learner.sae.eval()
    with torch.no_grad():
        ours, trained = finished(x), learner.sae(x * learner.scale)
    assert not finished.training
    torch.testing.assert_close(ours.reconstruction * learner.scale, trained.reconstruction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.latents.dense() * learner.scale, trained.latents.dense(), atol=1e-5, rtol=1e-5)
    assert float(ours.fvu) == pytest.approx(float(trained.fvu), rel=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_rows_have_length_one_after_every_step(name):
    learner = learner_of(CONFIGS[name])
    before = learner.sae.W_dec.detach().clone()
    for x in batches():
        learner.take_step(x)
        torch.testing.assert_close(learner.sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6, rtol=0)
    assert (learner.sae.W_dec - before).norm() > 0.1


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    learner = learner_of(CONFIGS["topk"], training(warmup_fraction=0.1, decay_start=0.5), num_steps=100)
    rates = []
    for learner.step in range(101):
        rates.append(learner.learning_rate())
    assert rates[:11] == pytest.approx([*(1e-3 * step for step in range(1, 11)), 1e-2])
    assert rates[50] == 1e-2
    assert rates[75] == pytest.approx(5e-3)
    assert rates[100] == 0
    learner.args = training(lr_scheduler_type="constant", warmup_fraction=0.0)
    learner.step = 0
    assert learner.learning_rate() == 1e-2


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_k_falls_to_its_end_and_stays(name):
    args = training(k_start=10, k_annealing_fraction=0.5)
    learner = learner_of(CONFIGS[name], args)
    l0 = [float(learner.take_step(x).latents.values.numel()) / TOKENS for x in batches()]
    assert l0 == [10, 8, 6, 4, 4, 4]
    assert learner.finished().encode_sparse(batches()[0]).values.numel() > 0
    assert learner.finished().annealed_k is None


def test_calibration_centres_and_scales():
    x = correlated(512, D_IN)
    learner = learner_of(CONFIGS["topk"], x=x)
    assert float((x * learner.scale - learner.sae.b_dec.detach()).square().mean()) == pytest.approx(1, rel=1e-4)
    plain = learner_of(CONFIGS["topk"], training(normalize_input=False), x=x)
    assert plain.scale == 1
    torch.testing.assert_close(plain.sae.b_dec * learner.scale, learner.sae.b_dec.detach())


@pytest.mark.parametrize("decoder_init", ["data", "random"])
@pytest.mark.parametrize("name", CONFIGS)
def test_first_reconstructions_are_as_long_as_what_they_are_of(name, decoder_init):
    x = correlated(512, D_IN)
    learner = learner_of(dataclasses.replace(CONFIGS[name], d_sae=D_SAE), training(decoder_init=decoder_init), x=x)
    centred = (x - learner.median) * learner.scale
    with torch.no_grad():
        reconstruction = learner.sae(x * learner.scale).reconstruction - learner.sae.b_dec
    ratio = float((centred * reconstruction).sum() / reconstruction.square().sum())
    assert ratio == pytest.approx(1, rel=0.1 if name == "jumprelu" else 1e-4)


def test_thresholds_leave_features_alive_at_first_however_many_there_are():
    """Scaled as without thresholds, none of them would reach its own."""
    config = dataclasses.replace(CONFIGS["jumprelu"], d_sae=512, bandwidth=0.05)
    learner = learner_of(config)
    assert float(learner.take_step(batches()[0]).l0) > 2


def test_features_begin_at_hidden_states_or_at_random():
    x = correlated(256, D_IN)
    found = {}
    for kind in ("data", "random"):
        learner = learner_of(CONFIGS["topk"], training(decoder_init=kind), x=x)
        cosines = F.normalize(x - learner.median, dim=1) @ learner.sae.W_dec.detach().T
        found[kind] = int((cosines.max(0).values > 1 - 1e-5).sum())
        parallel = F.cosine_similarity(learner.sae.W_enc, learner.sae.W_dec, dim=1)
        torch.testing.assert_close(parallel.detach(), torch.ones(D_SAE))
    assert found == {"data": D_SAE, "random": 0}


def test_dead_features_are_revived():
    """Features that begin with a bias far below zero never fire; their loss brings them back."""
    fractions = {}
    for coefficient in (0.0, 1.0):
        config = dataclasses.replace(CONFIGS["topk"], auxk_coefficient=coefficient)
        learner = learner_of(config, training(dead_after_tokens=TOKENS, lr_scheduler_type="constant"), num_steps=150)
        with torch.no_grad():
            learner.sae.b_enc[:12] = -3.0
        for x in batches(150):
            learner.take_step(x)
        fractions[coefficient] = float((learner.tokens_since_active[:12] >= 10 * TOKENS).float().mean())
    assert fractions[0.0] > 0.8
    assert fractions[1.0] < 0.3


def test_bfloat16_products_leave_float32_weights_and_train_nearly_alike():
    losses = {}
    for bf16 in (False, True):
        learner = learner_of(CONFIGS["topk"], training(bf16=bf16), num_steps=60)
        losses[bf16] = float([learner.take_step(x) for x in batches(60)][-1].fvu)
        assert {parameter.dtype for parameter in learner.sae.parameters()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.1)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(name, tmp_path):
    whole, half = learner_of(CONFIGS[name]), learner_of(CONFIGS[name])
    for x in batches()[:3]:
        whole.take_step(x)
        half.take_step(x)
    half.save(tmp_path / "a" / "half.safetensors", {"seed": 0})
    other = Learner(CONFIGS[name], training(), STEPS, CPU)
    other.load(tmp_path / "a" / "half.safetensors", {"seed": 0})
    for x in batches()[3:]:
        whole.take_step(x)
        other.take_step(x)
    assert (other.step, other.scale) == (whole.step, whole.scale)
    for ours, expected in zip(other._tensors().values(), whole._tensors().values(), strict=True):
        assert torch.equal(ours, expected)


def test_a_state_of_another_training_is_refused(tmp_path):
    learner = learner_of(CONFIGS["topk"])
    learner.take_step(batches()[0])
    learner.save(tmp_path / "state.safetensors", {"training": {"seed": 0, "epochs": 1}})
    with pytest.raises(ValueError, match="training with training.seed=0, not 3. Resume with the same options"):
        learner.load(tmp_path / "state.safetensors", {"training": {"seed": 3, "epochs": 1}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite_are_named(value):
    x = correlated(64, D_IN)
    x[10, 2] = value
    config = dataclasses.replace(CONFIGS["topk"], hookpoint="layers.7")
    with pytest.raises(FloatingPointError, match=r"'layers.7', step 1 are not finite"):
        learner_of(config, x=x)
    learner = learner_of(config)
    before = learner.sae.W_dec.detach().clone()
    with pytest.raises(FloatingPointError, match=r"'layers.7', step 1 are not finite.*dtype"):
        learner.take_step(x)
    assert torch.equal(learner.sae.W_dec, before)


def test_a_loss_that_is_not_finite_names_the_remedy():
    learner = learner_of(CONFIGS["topk"])
    with torch.no_grad():
        learner.sae.b_dec[0] = float("inf")
    with pytest.raises(FloatingPointError, match="the loss at None, step 1 is not finite. Pass a smaller learning_ra"):
        learner.take_step(batches()[0])


def test_constant_hidden_states_are_named():
    with pytest.raises(ValueError, match="constant, or not finite"):
        learner_of(CONFIGS["topk"], x=torch.ones(50, D_IN))


@pytest.mark.parametrize(("batch_tokens", "rate"), [(2048, 4e-3), (8192, 8e-3), (512, 2e-3)])
def test_the_default_learning_rate_goes_with_the_root_of_the_batch(batch_tokens, rate):
    assert SAETrainingConfig("unused", batch_tokens=batch_tokens).learning_rate == rate
