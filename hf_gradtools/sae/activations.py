"""From hidden states to latents, for each activation: which features are active, and how gradients reach them.

Every function takes the parameters and centred hidden states `[N, D]`, chooses a [`SparsePattern`], and computes
values on it whose gradients are those of the dense form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.selection import above, largest_in_batch, linear_top_k, pre_activations
from hf_gradtools.sae.sparse import SparseLatents, SparsePattern, linear_at


__all__ = ["ENCODERS", "Encoded", "jump_relu", "step"]

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """What an activation gives.

    Args:
        latents ([`SparseLatents`]): with gradients.
        l0 (`Tensor`, *optional*): number of active features with a gradient for the thresholds, a scalar: its mean
            over tokens. Of `"jumprelu"` alone.
        gates ([`SparseLatents`], *optional*): the positive parts of gates. Of `"gated"` alone.
    """

    latents: SparseLatents
    l0: Tensor | None = None
    gates: SparseLatents | None = None


def encode_topk(x: Tensor, weights: Parameters, config: SAEConfig, training: bool) -> Encoded:
    """The k largest of each token.

    Source:
        [Scaling and evaluating sparse autoencoders](https://arxiv.org/abs/2406.04093), equation 4.
    """
    values, indices = linear_top_k(x, weights["W_enc"], weights["b_enc"], config.k)
    return _positive(x, weights, SparsePattern.of_rows(indices, config.d_sae), values.reshape(-1))


def encode_batchtopk(x: Tensor, weights: Parameters, config: SAEConfig, training: bool) -> Encoded:
    """The k·N largest of a batch in training, those above the threshold learned then afterwards.

    Source:
        [BatchTopK Sparse Autoencoders](https://arxiv.org/abs/2412.06410), section 3.
    """
    pre = pre_activations(x, weights["W_enc"], weights["b_enc"])
    pattern = largest_in_batch(pre, config.k) if training else above(pre, weights["threshold"])
    return _positive(x, weights, pattern, _take(pre, pattern))


def encode_relu(x: Tensor, weights: Parameters, config: SAEConfig, training: bool) -> Encoded:
    """All positive ones."""
    pre = pre_activations(x, weights["W_enc"], weights["b_enc"])
    pattern = above(pre, 0)
    return _positive(x, weights, pattern, _take(pre, pattern))


def encode_jumprelu(x: Tensor, weights: Parameters, config: SAEConfig, training: bool) -> Encoded:
    """Those above learned thresholds; in training also pairs so near to theirs that they bear on its gradient.

    Source:
        [Jumping Ahead](https://arxiv.org/abs/2407.14435), equations 3, 11 and 12.
    """
    pre = pre_activations(x, weights["W_enc"], weights["b_enc"])
    threshold = weights["threshold"]
    margin = config.bandwidth / 2 if training else 0.0
    pattern = above(pre, threshold - margin)
    values = linear_at(x, weights["W_enc"], weights["b_enc"], pattern, _take(pre, pattern))
    own = threshold.expand(config.d_sae)[pattern.indices].to(values.dtype)
    active = step(values, own, config.bandwidth)
    l0 = active.sum(dtype=torch.promote_types(active.dtype, torch.float32)) / x.shape[0]
    return Encoded(SparseLatents(jump_relu(values, own, config.bandwidth), pattern), l0=l0)


def encode_gated(x: Tensor, weights: Parameters, config: SAEConfig, training: bool) -> Encoded:
    """Those whose gate is open, with a magnitude that has its own scale and bias.

    Source:
        [Gated Sparse Autoencoders](https://arxiv.org/abs/2404.16014), equations 4-8.
    """
    pre = pre_activations(x, weights["W_enc"], weights["b_enc"])
    pattern = above(pre, 0)
    at = pattern.indices
    shared = linear_at(x, weights["W_enc"], None, pattern, _take(pre, pattern) - weights["b_enc"].detach()[at])
    magnitudes = (shared * weights["r_mag"].exp()[at] + weights["b_mag"][at]).relu()
    gates = (shared + weights["b_enc"][at]).relu()
    return Encoded(SparseLatents(magnitudes, pattern), gates=SparseLatents(gates, pattern))


ENCODERS: dict[str, Callable[[Tensor, Parameters, SAEConfig, bool], Encoded]] = {
    "topk": encode_topk,
    "batchtopk": encode_batchtopk,
    "relu": encode_relu,
    "jumprelu": encode_jumprelu,
    "gated": encode_gated,
}


def jump_relu(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`values` where they exceed the thresholds, zero elsewhere; thresholds by a straight-through estimate.

    Args:
        values (`Tensor`): any shape.
        threshold (`Tensor`): of the same shape.
        bandwidth (`float`): within half of it around a threshold, its gradient is `-threshold / bandwidth`.
    """
    return _JumpReLU.apply(values, threshold, bandwidth)


def step(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 where `values` exceed the thresholds, else 0; the thresholds' gradient is `-1 / bandwidth` near them."""
    return _Step.apply(values, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return values * (values > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        values, threshold = ctx.saved_tensors
        near = _near(values, threshold, ctx.bandwidth)
        return grad * (values > threshold), -grad * near * threshold / ctx.bandwidth, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        values, threshold = ctx.saved_tensors
        return None, -grad * _near(values, threshold, ctx.bandwidth) / ctx.bandwidth, None


def _near(values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (values - threshold).abs() < bandwidth / 2


def _positive(x: Tensor, weights: Parameters, pattern: SparsePattern, values: Tensor) -> Encoded:
    """Latents that are the pre-activations, or zero below it."""
    values = linear_at(x, weights["W_enc"], weights["b_enc"], pattern, values)
    return Encoded(SparseLatents(values.relu(), pattern))


def _take(pre: Tensor, pattern: SparsePattern) -> Tensor:
    return pre[pattern.rows, pattern.indices]
