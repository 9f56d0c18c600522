"""What turns attention scores into weights.

Contract: `variant(scores, allowed) -> weights`, where `scores` are `[B, H, Q, K]`, `allowed` is a bool that
broadcasts to them, and a weight is exactly 0 where it is False, also where a whole row is. No score of a key that is
not allowed reaches any result, nor a gradient: it is replaced before the first operation, never set to -inf.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .costs import Ops
from .registry import Component, register


class Softmax(Component):
    """Base of the weightings. `row_sum` says whether a row is divided by what it sums to."""

    row_sum = False

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__()

    def forward(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return self.weigh(scores.masked_fill(~allowed, 0.0)).masked_fill(~allowed, 0.0)

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights of scores one by one, for those variants that look at no others."""
        raise NotImplementedError


def normalized_powers(
    scores: Tensor, allowed: Tensor, log_base: float, *, subtract_max: bool = True, off_by_one: Tensor | float = 0.0
) -> Tensor:
    """b^s_ij / (C + sum_k b^s_ik) over the allowed keys.

    Args:
        scores (`Tensor`): `[B, H, Q, K]`.
        allowed (`Tensor`): bool, broadcasts to the scores.
        log_base (`float`): ln b.
        subtract_max (`bool`): whether powers are taken relative to the row's largest, which changes no weight.
        off_by_one (`Tensor` or `float`): C.
    """
    exponents = scores * log_base
    has_constant = isinstance(off_by_one, Tensor) or off_by_one > 0
    shift = torch.zeros_like(exponents[..., :1])
    if subtract_max:
        lowest = torch.finfo(scores.dtype).min
        shift = exponents.masked_fill(~allowed, lowest).amax(-1, keepdim=True).detach()
        # The constant is a power of exponent 0: no shift below that, or b^-shift overflows. A row without keys has 0.
        shift = shift.clamp(min=0.0) if has_constant else shift.masked_fill(shift == lowest, 0.0)
    powers = (exponents - shift).masked_fill(~allowed, 0.0).exp().masked_fill(~allowed, 0.0)
    total = powers.sum(-1, keepdim=True)
    if has_constant:
        total = total + off_by_one * torch.exp(-shift)
    return powers / total.masked_fill(total == 0, 1.0)


class RowSoftmax(Softmax):
    """A softmax of base b: one exponential a score, a row's maximum and sum, one reciprocal a row."""

    row_sum = True
    log_base = 1.0
    subtract_max = True

    def forward(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return normalized_powers(scores, allowed, self.log_base, subtract_max=self.subtract_max)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        shifted = Ops(max=pairs, add=pairs) if self.subtract_max else Ops()
        return shifted + Ops(exp=pairs, add=pairs, mul=pairs, div=tokens)


@register("softmax", "softmax")
class PlainSoftmax(RowSoftmax):
    """e^s / sum e^s. The one that `scaled_dot_product_attention` computes."""


@register("softmax", "softermax")
class Softermax(RowSoftmax):
    """Base 2 (arXiv 2103.09301), whose powers cost hardware a shift."""

    log_base = math.log(2.0)

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.subtract_max = config.softermax_use_xmax


@register("softmax", "strongermax")
class Strongermax(RowSoftmax):
    """b^s / (C + sum b^s) / divisor with b `strongermax_strength` and C `strongermax_obo` (off by one)."""

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.log_base = math.log(config.strongermax_strength)
        self.subtract_max = config.strongermax_use_xmax
        self.row_sum = config.strongermax_div_by_sum_of_terms
        self.divisor = config.strongermax_divisor
        self.obo_init = config.strongermax_obo
        self.obo: nn.Parameter | None = None
        if config.strongermax_use_learned_obo or config.strongermax_use_learned_obo_per_head:
            heads = n_head if config.strongermax_use_learned_obo_per_head else 1
            self.obo = nn.Parameter(torch.full((heads,), float(self.obo_init)))

    def init_parameters(self) -> None:
        if self.obo is not None:
            init.constant_(self.obo, self.obo_init)

    def forward(self, scores: Tensor, allowed: Tensor) -> Tensor:
        if not self.row_sum:
            return Softmax.forward(self, scores, allowed)
        constant = self.obo_init if self.obo is None else self.obo.abs().view(-1, 1, 1)  # a denominator keeps its sign
        weights = normalized_powers(
            scores, allowed, self.log_base, subtract_max=self.subtract_max, off_by_one=constant
        )
        return weights if self.divisor == 1.0 else weights / self.divisor

    def weigh(self, scores: Tensor) -> Tensor:
        return torch.exp(scores * self.log_base) / self.divisor

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        divided = Ops() if self.divisor == 1.0 else Ops(mul=pairs)
        if not self.row_sum:
            return Ops(exp=pairs) + divided
        has_constant = self.obo is not None or self.obo_init > 0
        constant = Ops(add=tokens, exp=tokens if self.subtract_max else 0) if has_constant else Ops()
        return super().ops(tokens, pairs) + constant + divided


@register("softmax", "consmax")
class ConSmax(Softmax):
    """b^(s - beta) / gamma, beta and gamma learned per layer: no row is reduced (arXiv 2402.10930, equation 2)."""

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.log_base = 1.0 if config.consmax_use_euler_base else math.log(config.consmax_base)
        self.initial = (config.consmax_initial_beta, config.consmax_initial_gamma)
        self.beta = nn.Parameter(torch.full((1,), float(self.initial[0])))
        self.gamma = nn.Parameter(torch.full((1,), float(self.initial[1])))

    def init_parameters(self) -> None:
        init.constant_(self.beta, self.initial[0])
        init.constant_(self.gamma, self.initial[1])

    def weigh(self, scores: Tensor) -> Tensor:
        return torch.exp((scores - self.beta) * self.log_base) / self.gamma

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops(add=pairs, exp=pairs, mul=pairs)  # 1 / gamma is a constant of the trained model


@register("softmax", "consmax_v2")
class ConSmaxV2(Softmax):
    """ConSmax with factors of beta and gamma per head, and exponents no larger than `consmax_v2_clamp_value`."""

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.log_base = 1.0 if config.consmax_use_euler_base else math.log(config.consmax_base)
        self.initial = (config.consmax_initial_beta, config.consmax_initial_gamma)
        self.largest = config.consmax_v2_clamp_value if config.consmax_v2_clamping else None
        self.beta_factor = nn.Parameter(torch.ones(n_head))
        self.gamma_factor = nn.Parameter(torch.ones(n_head))

    def init_parameters(self) -> None:
        init.ones_(self.beta_factor)
        init.ones_(self.gamma_factor)

    def weigh(self, scores: Tensor) -> Tensor:
        exponents = scores - self.initial[0] * self.beta_factor.view(-1, 1, 1)
        if self.largest is not None:
            exponents = exponents.clamp(max=self.largest)
        return torch.exp(exponents * self.log_base) / (self.initial[1] * self.gamma_factor.view(-1, 1, 1))

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops(add=pairs, exp=pairs, mul=pairs, max=pairs if self.largest is not None else 0)


class ElementWise(Softmax):
    """f(s) / divisor, with the divisor `<name>_divisor` of the configuration."""

    per_score: Ops
    divisor_field: str

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.divisor = getattr(config, self.divisor_field)

    def function(self, scores: Tensor) -> Tensor:
        """f."""
        raise NotImplementedError

    def weigh(self, scores: Tensor) -> Tensor:
        return self.function(scores) / self.divisor

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return pairs * (self.per_score + Ops(mul=1))


@register("softmax", "sigmoidmax")
class SigmoidMax(ElementWise):
    """f = 1 / (1 + e^-s)."""

    per_score = Ops(exp=1, add=1, div=1)
    divisor_field = "sigmoidmax_divisor"

    def function(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores)


@register("softmax", "relumax")
class ReLUMax(ElementWise):
    """f = max(s, 0): no exponential."""

    per_score = Ops(max=1)
    divisor_field = "relumax_divisor"

    def function(self, scores: Tensor) -> Tensor:
        return torch.relu(scores)


@register("softmax", "relu2max")
class ReLU2Max(ElementWise):
    """f = max(s, 0)^2."""

    per_score = Ops(max=1, mul=1)
    divisor_field = "relu2max_divisor"

    def function(self, scores: Tensor) -> Tensor:
        return torch.relu(scores).square()


@register("softmax", "softplus")
class SoftplusMax(ElementWise):
    """f = ln(1 + e^s)."""

    per_score = Ops(exp=1, add=1, log=1)
    divisor_field = "softplus_divisor"

    def function(self, scores: Tensor) -> Tensor:
        return nn.functional.softplus(scores)


@register("softmax", "squareplus")
class SquareplusMax(ElementWise):
    """f = (s + sqrt(s^2 + 4)) / 2 (arXiv 2112.11687)."""

    per_score = Ops(mul=2, add=2, sqrt=1)
    divisor_field = "squareplus_divisor"

    def function(self, scores: Tensor) -> Tensor:
        return (scores + torch.sqrt(scores.square() + 4)) / 2


@register("softmax", "polymax")
class Polymax(ElementWise):
    """f = 0 left of `polymax_x_intercept`, a line from there up to (0, y_intercept), then s^power + y_intercept."""

    per_score = Ops(mul=2, add=1, max=1)  # the power by repeated products is counted as one
    divisor_field = "polymax_divisor"

    def __init__(self, config: Any, layer_idx: int = 0, n_head: int = 1):
        super().__init__(config)
        self.y_intercept = config.polymax_y_intercept
        self.slope = config.polymax_y_intercept / -config.polymax_x_intercept
        self.power = config.polymax_power

    def function(self, scores: Tensor) -> Tensor:
        line = torch.relu(self.slope * scores.clamp(max=0.0) + self.y_intercept)
        return line + scores.clamp(min=0.0).pow(self.power)


@register("softmax", "sigsoftmax")
class SigSoftmax(Softmax):
    """e^s sigmoid(s) / sum (arXiv 1805.10829)."""

    row_sum = True

    def forward(self, scores: Tensor, allowed: Tensor) -> Tensor:
        scores = scores.masked_fill(~allowed, 0.0)
        return normalized_powers(scores + nn.functional.logsigmoid(scores), allowed, 1.0)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops(max=pairs, exp=2 * pairs, add=3 * pairs, mul=2 * pairs, div=pairs + tokens)
