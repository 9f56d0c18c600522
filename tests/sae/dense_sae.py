"""Sparse autoencoders written densely, as their papers do, for autograd to differentiate. Shares no code with ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.modeling_sae import SAE


@dataclass
class Dense:
    loss: Tensor
    reconstruction: Tensor
    latents: Tensor
    mse: Tensor
    sparsity: Tensor
    auxk: Tensor


def forward(sae: SAE, x: Tensor, dead: Tensor | None = None) -> Dense:
    config, p = sae.config, {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
    pre = (x - p["b_dec"] if config.apply_b_dec_to_input else x) @ p["W_enc"].T + p["b_enc"]
    latents, penalised, l0 = activate(pre, p, config, sae.training)
    reconstruction = latents @ p["W_dec"] + p["b_dec"]
    widths = config.matryoshka_widths or (config.d_sae,)
    prefixes = [latents[:, :width] @ p["W_dec"][:width] + p["b_dec"] for width in widths]
    errors = [((x - prefix) ** 2).mean() for prefix in prefixes]
    sparsity = {
        "none": x.new_zeros(()),
        "l1": (penalised * p["W_dec"].pow(2).sum(1).sqrt()).sum(1).mean(),
        "l0": l0,
    }[config.sparsity_penalty]
    auxk = x.new_zeros(()) if dead is None else auxk_loss(pre, p, x - reconstruction, dead, config)
    loss = sum(errors) / len(errors) + config.auxk_coefficient * auxk
    if config.sparsity_penalty != "none":
        loss = loss + config.sparsity_coefficient * sparsity
    if config.activation == "gated":
        frozen = penalised @ p["W_dec"].detach() + p["b_dec"].detach()
        loss = loss + ((x - frozen) ** 2).mean()
    return Dense(loss, reconstruction, latents, errors[-1], sparsity, auxk)


def activate(
    pre: Tensor, p: dict[str, Tensor], config: SAEConfig, training: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, what an L1 penalty is on, and the number of active features where a gradient of it is defined."""
    if config.activation == "relu":
        latents = pre.clamp(min=0)
    elif config.activation == "topk":
        latents = pre.clamp(min=0) * rank_mask(pre, config.k)
    elif config.activation == "batchtopk" and training:
        latents = pre.clamp(min=0) * rank_mask(pre.reshape(1, -1), config.k * len(pre)).reshape(pre.shape)
    elif config.activation == "batchtopk":
        latents = pre.clamp(min=0) * (pre > p["threshold"])
    elif config.activation == "jumprelu":
        return jump_relu(pre, p["threshold"], config.bandwidth)
    else:
        gate = pre
        magnitude = (pre - p["b_enc"]) * p["r_mag"].exp() + p["b_mag"]
        return (gate > 0) * magnitude.clamp(min=0), gate.clamp(min=0), None
    return latents, latents, None


def rank_mask(values: Tensor, k: int) -> Tensor:
    order = values.detach().argsort(dim=1, descending=True)
    return torch.zeros_like(values).scatter(1, order[:, :k], 1.0)


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Jumping Ahead, equations 11 and 12, with a rectangle as the kernel: terms of value zero carry the gradients."""
    active = (pre > threshold).to(pre.dtype).detach()
    kernel = ((pre - threshold).abs() / bandwidth < 0.5).to(pre.dtype).detach()
    jump = -threshold.detach() / bandwidth * kernel * threshold
    step = -1 / bandwidth * kernel * threshold
    latents = pre * active + jump - jump.detach()
    return latents, latents, (active + step - step.detach()).sum(1).mean()


def auxk_loss(pre: Tensor, p: dict[str, Tensor], residual: Tensor, dead: Tensor, config: SAEConfig) -> Tensor:
    k = config.auxk or max(1, config.d_in // 2)
    taken = min(k, int(dead.sum()))
    mask = rank_mask(pre.masked_fill(~dead, -torch.inf), taken)
    model = torch.where(mask > 0, pre, 0.0) @ p["W_dec"]
    return ((model - residual.detach()) ** 2).mean() * taken / k
