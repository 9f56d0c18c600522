"""What training does to an autoencoder: norms, thresholds, revival of dead features, and folding a scale in."""

from __future__ import annotations

import pytest
import torch

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.modeling_sae import SAE


D, F, K = 8, 32, 4
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")


def batches(count, tokens=128):
    """Sparse sums of 24 directions, of which no autoencoder has all unless its dead features learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=generator), dim=1)
    for _ in range(count):
        active = torch.rand(tokens, 24, generator=generator) < 0.1
        yield (active * (1 + torch.rand(tokens, 24, generator=generator))) @ directions


def train(sae, steps, dead=None, learning_rate=0.01):
    optimizer = torch.optim.Adam(sae.parameters(), learning_rate)
    for x in batches(steps):
        optimizer.zero_grad()
        output = sae(x, dead=dead)
        output.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()
        yield output


def with_dead_features(activation, how):
    """The second half of the features is active on no token."""
    sae = SAE(SAEConfig(D, F, activation, k=K, auxk=K, auxk_coefficient=1.0), seed=0)
    dead = torch.arange(F) >= F // 2
    with torch.no_grad():
        if how == "bias":
            sae.b_enc[dead] = -8.0
        else:  # centred tokens lie far off in one direction, and these encoders point away from it
            sae.b_dec.fill_(-3.0)
            sae.W_enc[dead] = -torch.nn.functional.normalize(0.2 + torch.rand(F // 2, D), dim=1)
    return sae, dead


def num_alive(sae, dead):
    with torch.no_grad():
        return int((sae.encode(torch.cat(list(batches(4)))) > 0).any(0)[dead].sum())


@pytest.mark.parametrize("how", ["bias", "direction"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dead_features_come_alive_by_their_loss_and_not_without(activation, how):
    sae, dead = with_dead_features(activation, how)
    assert num_alive(sae, dead) == 0
    for _ in train(sae, 100, dead, learning_rate=0.05):
        pass
    assert num_alive(sae, dead) >= 3
    sae, dead = with_dead_features(activation, how)
    before = sae.W_enc[dead].clone()
    for _ in train(sae, 50, None, learning_rate=0.05):
        pass
    assert num_alive(sae, dead) == 0
    assert torch.equal(sae.W_enc[dead], before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoder_rows_keep_length_one_at_each_step(activation):
    sae = SAE(SAEConfig(D, F, activation, k=K), seed=0)
    first = sae.W_dec.detach().clone()
    for _ in train(sae, 10):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-6, rtol=0)
    assert (sae.W_dec - first).abs().max() > 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_gradient_is_left_along_decoder_rows(activation):
    sae = SAE(SAEConfig(D, F, activation, k=K), seed=0).double()
    sae.normalize_decoder_()
    sae(next(batches(1)).double()).loss.backward()
    before = sae.W_dec.grad.clone()
    assert (before * sae.W_dec).sum(1).abs().max() > 1e-3
    sae.remove_parallel_gradient_()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-14
    taken = before - sae.W_dec.grad
    torch.testing.assert_close(taken, (taken * sae.W_dec).sum(1, keepdim=True) * sae.W_dec)


def test_a_decoder_row_of_zeros_stays_finite():
    sae = SAE(SAEConfig(D, F, k=K), seed=0)
    sae.W_dec.data[3] = 0
    sae.normalize_decoder_()
    assert torch.isfinite(sae.W_dec).all()
    sae.remove_parallel_gradient_()  # without a gradient, nothing happens


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_folded_scale_leaves_reconstructions_equal(activation, centred):
    torch.manual_seed(1)
    sae = SAE(SAEConfig(D, F, activation, k=K, apply_b_dec_to_input=centred)).double().eval()
    for name, tensor in sae.state_dict().items():
        tensor.copy_(0.2 * torch.rand_like(tensor) if name == "threshold" else tensor + 0.1 * torch.randn_like(tensor))
    sae.normalize_decoder_()
    x, scale = 5 * torch.randn(40, D, dtype=torch.float64), 0.37
    with torch.no_grad():
        expected, latents = sae(scale * x).reconstruction / scale, sae.encode(scale * x)
        sae.fold_scale_(scale)
        torch.testing.assert_close(sae(x).reconstruction, expected)
        torch.testing.assert_close(sae.encode(x), latents / scale)
    assert (latents > 0).any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))


def test_batchtopk_has_about_as_many_features_by_threshold_as_by_rank():
    sae = SAE(SAEConfig(D, F, "batchtopk", k=K), seed=0)
    for output in train(sae, 300):
        sae.update_threshold_(output.latents, decay=0.9)
    x = torch.cat(list(batches(8)))
    by_rank = float(sae(x).l0)
    sae.eval()
    by_threshold = float(sae(x).l0)
    assert by_rank == pytest.approx(K, abs=0.5)
    assert by_threshold == pytest.approx(by_rank, rel=0.1)
    assert torch.unique(sae.threshold).numel() == 1
    # One token alone has those features that it has in a batch.
    torch.testing.assert_close(sae.encode(x[3]), sae.encode(x)[3])


def test_a_threshold_is_learned_from_what_was_kept():
    sae = SAE(SAEConfig(D, F, "batchtopk", k=K), seed=0)
    latents = sae.encode_sparse(next(batches(1)))
    smallest = latents.values[latents.values > 0].min().detach()
    sae.update_threshold_(latents)
    torch.testing.assert_close(sae.threshold, smallest.expand(F))  # the first at once
    sae.threshold.fill_(1.0)
    sae.update_threshold_(latents, decay=0.75)
    torch.testing.assert_close(sae.threshold, (0.75 + 0.25 * smallest).expand(F))
