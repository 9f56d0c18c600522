"""Normalisations of the last dimension; none mixes tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .costs import Ops
from .registry import Component, register


class Norm(Component):
    """Base of the norms, over vectors of `size` numbers."""

    def __init__(self, config: Any, size: int):
        super().__init__()
        self.size = size
        self.eps = config.norm_eps

    def init_parameters(self) -> None:
        if getattr(self, "weight", None) is not None:
            init.ones_(self.weight)
        if getattr(self, "bias", None) is not None:
            init.zeros_(self.bias)


@register("norm", "layernorm")
class LayerNorm(Norm):
    """(x - mean) / sqrt(variance + eps) * weight, plus a bias if the model has biases."""

    def __init__(self, config: Any, size: int):
        super().__init__(config, size)
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n = self.size
        moments = Ops(add=2 * n, mul=1) + Ops(mul=n + 1, add=n)  # mean and centring; mean square
        scale = Ops(add=1, sqrt=1, div=1, mul=2 * n)
        return (moments + scale + Ops(add=n if self.bias is not None else 0)) * tokens


@register("norm", "rmsnorm")
class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467)."""

    def __init__(self, config: Any, size: int):
        super().__init__(config, size)
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n = self.size
        return Ops(mul=3 * n + 1, add=n + 1, sqrt=1, div=1) * tokens


@register("norm", "prmsnorm")
class PartialRMSNorm(Norm):
    """RMSNorm whose mean square is of the first `prmsnorm_pct` of the numbers (arXiv 1910.07467, section 5.2)."""

    def __init__(self, config: Any, size: int):
        super().__init__(config, size)
        self.measured = max(1, math.ceil(size * config.prmsnorm_pct))
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x[..., : self.measured].square().mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n, k = self.size, self.measured
        return Ops(mul=k + 1 + 2 * n, add=k + 1, sqrt=1, div=1) * tokens


@register("norm", "hyperspherenorm")
class HyperSphereNorm(Norm):
    """Projection to the sphere of radius `hsnorm_radius` (default sqrt(size)): x / max(|x|, eps) * radius."""

    def __init__(self, config: Any, size: int):
        super().__init__(config, size)
        self.radius = math.sqrt(size) if config.hsnorm_radius is None else config.hsnorm_radius
        self.weight = nn.Parameter(torch.ones(size)) if config.hsnorm_gain else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1, eps=self.eps) * self.radius
        return x if self.weight is None else x * self.weight

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n = self.size
        gain = 0 if self.weight is None else n
        return Ops(mul=2 * n + gain, add=n, sqrt=1, max=1, div=1) * tokens


@register("norm", "dact")
class DynamicActivation(Norm):
    """DyT: weight * tanh(alpha * x) + bias, which reduces over nothing (arXiv 2503.10622)."""

    def __init__(self, config: Any, size: int):
        super().__init__(config, size)
        self.alpha_init = config.dact_alpha_init
        self.alpha = nn.Parameter(torch.full((1,), float(self.alpha_init)))
        self.weight = nn.Parameter(torch.ones(size)) if config.dact_use_gamma else None
        self.bias = nn.Parameter(torch.zeros(size)) if config.dact_use_beta else None

    def init_parameters(self) -> None:
        super().init_parameters()
        init.constant_(self.alpha, self.alpha_init)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.alpha * x)
        if self.weight is not None:
            x = x * self.weight
        return x if self.bias is None else x + self.bias

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n = self.size
        gain, shift = (0 if p is None else n for p in (self.weight, self.bias))
        return Ops(mul=n + gain, tanh=n, add=shift) * tokens


@register("norm", "identity")
class IdentityNorm(Norm):
    """x."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops()
