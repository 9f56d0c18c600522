"""Linear maps, in full precision or trained for few bits.

The rounding of the last two passes its gradient straight through (arXiv 1308.3432): the backward is that of the
linear map with the rounded weights, at the rounded inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .costs import Ops
from .registry import register, variant


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """`rounded` in the forward, the gradient of `x` in the backward."""
    return x + (rounded - x).detach()


@register("linear", "linear")
def linear(config: Any, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """x W^T + b: torch's own class and no other, which is what bitsandbytes looks for."""
    return nn.Linear(in_features, out_features, bias=bias)


class RoundedLinear(nn.Linear):
    """Base of the linear maps that round in training as they will in use."""

    def __init__(self, config: Any, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias=bias)

    def ops(self, tokens: int) -> Ops:
        """Operations for `tokens` vectors."""
        bias = self.out_features if self.bias is not None else 0
        return Ops(mac=self.in_features * self.out_features, add=bias) * tokens


@register("linear", "bitlinear_1p58")
class BitLinear(RoundedLinear):
    """Weights in {-1, 0, 1} times their mean magnitude, inputs in 8 bits per token (b1.58, arXiv 2402.17764)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = straight_through(ternary(self.weight), self.weight)
        return F.linear(straight_through(absmax_8bit(x), x), weight, self.bias)

    def ops(self, tokens: int) -> Ops:
        # Products with -1, 0 and 1 are additions; each input is scaled by 127 / max |x|, each output by both scales.
        n_in, n_out = self.in_features, self.out_features
        bias = n_out if self.bias is not None else 0
        return Ops(add=n_in * n_out + bias, max=n_in, div=1, mul=n_in + n_out + 1) * tokens


@register("linear", "quantized_linear")
class QuantizedLinear(RoundedLinear):
    """Weights rounded to `quantize_linear_bits` bits, symmetric, one scale per output, while they train."""

    def __init__(self, config: Any, in_features: int, out_features: int, bias: bool):
        super().__init__(config, in_features, out_features, bias)
        self.bits = config.quantize_linear_bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, straight_through(symmetric(self.weight, self.bits), self.weight), self.bias)


def ternary(weight: Tensor) -> Tensor:
    """{-1, 0, 1} times the mean magnitude, the nearest of the three."""
    scale = weight.abs().mean().clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().clamp(-1, 1) * scale


def absmax_8bit(x: Tensor) -> Tensor:
    """Each token's vector rounded to 255 levels between its largest magnitude and minus that."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127) * scale


def symmetric(weight: Tensor, bits: int) -> Tensor:
    """Each row rounded to 2^bits - 1 levels between its largest magnitude and minus that."""
    levels = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / levels
    return (weight / scale).round().clamp(-levels, levels) * scale


def build_linear(
    config: Any,
    field: str,
    layer_idx: int,
    in_features: int,
    out_features: int,
    *,
    bias: bool | None = None,
    residual: bool = False,
) -> nn.Module:
    """The linear map that a field of the configuration names.

    Args:
        config (`NanoGPTConfig`): the configuration.
        field (`str`): such as "linear_variant_attn".
        layer_idx (`int`): the layer it is for.
        in_features, out_features (`int`): sizes.
        bias (`bool`, *optional*): whether it adds a bias; default as the model.
        residual (`bool`): whether its output is added to the residual stream.
    """
    bias = config.bias if bias is None else bias
    linear = variant("linear", config.of_layer(field, layer_idx))(config, in_features, out_features, bias)
    linear.residual_projection = residual  # the model starts those smaller
    return linear


def linear_ops(module: nn.Module, tokens: int) -> Ops:
    """Operations of a linear map for `tokens` vectors."""
    return module.ops(tokens) if isinstance(module, RoundedLinear) else RoundedLinear.ops(module, tokens)
