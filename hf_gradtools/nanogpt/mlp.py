"""Feed-forward parts of a block. Each token goes through on its own.

Shapes: B batch, S tokens, E `n_embd`, F hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activations import build_activation
from .costs import Ops
from .linear import build_linear, linear_ops
from .registry import Component, register


class FeedForward(Component):
    """Base of the MLPs: maps `[B, S, E]` to the same shape."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        size = config.of_layer("mlp_size", layer_idx)
        self.size = config.mlp_expansion_factor * config.n_embd if size is None else size


def _up(config: Any, layer_idx: int, size: int) -> nn.Module:
    return build_linear(config, "linear_variant_mlp_up", layer_idx, config.n_embd, size)


def _down(config: Any, layer_idx: int, size: int) -> nn.Module:
    return build_linear(config, "linear_variant_mlp_down", layer_idx, size, config.n_embd, residual=True)


@register("mlp", "mlp")
class MLP(FeedForward):
    """W_2 act(W_1 x)."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.c_fc = _up(config, layer_idx, self.size)
        self.act = build_activation(config, layer_idx, default="gelu")
        self.c_proj = _down(config, layer_idx, self.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.act(self.c_fc(x))))

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return linear_ops(self.c_fc, tokens) + self.act.ops(tokens * self.size) + linear_ops(self.c_proj, tokens)


@register("mlp", "swiglu")
class SwiGLU(FeedForward):
    """W_o (act(W_1 x) * W_2 x) (arXiv 2002.05202); act is SiLU unless `activation_variant` is set."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.c_gate = _up(config, layer_idx, self.size)
        self.c_fc = _up(config, layer_idx, self.size)
        self.act = build_activation(config, layer_idx, default="silu")
        self.c_proj = _down(config, layer_idx, self.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.act(self.c_gate(x)) * self.c_fc(x)))

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        hidden = tokens * self.size
        return (
            2 * linear_ops(self.c_fc, tokens)
            + self.act.ops(hidden)
            + Ops(mul=hidden)
            + linear_ops(self.c_proj, tokens)
        )


@register("mlp", "identity")
class IdentityMLP(FeedForward):
    """x."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops()


def legendre(x: Tensor, order: int) -> Tensor:
    """Legendre polynomials P_0 ... P_order of each number, in a new last dimension.

    Source: Bonnet's recursion, (n + 1) P_{n+1} = (2n + 1) x P_n - n P_{n-1}.
    """
    polynomials = [torch.ones_like(x), x]
    for n in range(1, order):
        polynomials.append(((2 * n + 1) * x * polynomials[n] - n * polynomials[n - 1]) / (n + 1))
    return torch.stack(polynomials[: order + 1], dim=-1)


class KALLayer(Component):
    """y = act(LN(W_b act(x) + W_p [P_0 ... P_K](tanh x))), of KAL-Net.

    The polynomials' argument is made of each number alone. Scaling by the extremes of a sequence, as the original
    does, would tell a token of those that follow it.
    """

    def __init__(self, config: Any, layer_idx: int, in_features: int, out_features: int, residual: bool):
        super().__init__()
        self.order = config.kan_poly_order
        self.in_features, self.out_features = in_features, out_features
        self.base = build_linear(config, "linear_variant_mlp_up", layer_idx, in_features, out_features, bias=False)
        self.poly = build_linear(
            config, "linear_variant_mlp_up", layer_idx, in_features * (self.order + 1), out_features, bias=False
        )
        self.base.residual_projection = self.poly.residual_projection = residual
        self.norm = nn.LayerNorm(out_features, eps=config.norm_eps)
        self.act = build_activation(config, layer_idx, default=config.kan_base_activation)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(self.act(x))
        poly = self.poly(legendre(torch.tanh(x), self.order).flatten(-2))
        return self.act(self.norm(base + poly))

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        inputs, outputs = tokens * self.in_features, tokens * self.out_features
        recursion = Ops(mul=4, add=1) * (max(self.order - 1, 0) * inputs)
        n = self.out_features
        norm = Ops(add=4 * n + 1, mul=3 * n + 2, sqrt=1, div=1) * tokens
        linears = linear_ops(self.base, tokens) + linear_ops(self.poly, tokens) + Ops(add=outputs)
        return self.act.ops(inputs + outputs) + Ops(tanh=inputs) + recursion + linears + norm


@register("mlp", "kan")
class KAN(FeedForward):
    """A chain of [`KALLayer`]s through the sizes of `kan_middle_layers`."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        sizes = [config.n_embd, *(config.kan_middle_layers or []), config.n_embd]
        last = len(sizes) - 2
        self.layers = nn.Sequential(
            *(KALLayer(config, layer_idx, sizes[i], sizes[i + 1], residual=i == last) for i in range(len(sizes) - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layers(x))

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return sum(layer.ops(tokens) for layer in self.layers)
