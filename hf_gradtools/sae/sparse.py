"""Sparse arithmetic: which features are active on which token, and the three products that this makes cheap.

Shape letters: N tokens, D = `d_in`, F = `d_sae`, M active (token, feature) pairs. A [`SparsePattern`] P is the set of
those pairs. With values on it, it is a sparse matrix [N, F], and of an autoencoder's five products only one, the
encoder's forward, is dense:

    decode               combine(values, W_dec)    P @ W            [N, D]     M·D multiply-adds
    gradient of latents  dot(grad, W_dec)          (G @ W.T) on P   [M]        M·D
    gradient of W_dec    scatter(values, grad)     P.T @ G          [F, D]     M·D
    gradient of W_enc    scatter(grad_values, x)   P.T @ X          [F, D]     M·D

against N·F·D each. Tokens are gathered by feature for the last two, so neither is scattered with atomics: the same
numbers come out on every run (but for the last bits of `b_enc`'s gradient on CUDA, where bincount uses them). Where
many pairs are active, the same products are taken densely.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


__all__ = ["SparseLatents", "SparsePattern", "decode", "linear_at"]

# Above this share of active pairs the products are dense: gathering rows costs as much from a share of 0.2 on in
# float32, of 0.13 in bfloat16 (measured at D = 768, F = 4096 on a CPU core).
DENSE_ABOVE = 0.1


class SparsePattern:
    """Which features are active on which token, in compressed rows.

    Args:
        indices (`Tensor`): `[M]` int64, features of the first token, then of the second, and so on.
        offsets (`Tensor`): `[N + 1]` int64; token n has `indices[offsets[n]:offsets[n + 1]]`.
        d_sae (`int`): number of features F.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, d_sae: int):
        self.indices, self.offsets, self.d_sae = indices, offsets, d_sae

    @classmethod
    def of_rows(cls, indices: Tensor, d_sae: int) -> SparsePattern:
        """The pattern in which every token has as many features: `indices` is `[N, K]`."""
        num_tokens, k = indices.shape
        offsets = (
            torch.arange(0, (num_tokens + 1) * k, k, device=indices.device) if k else indices.new_zeros(num_tokens + 1)
        )
        return cls(indices.reshape(-1).contiguous(), offsets, d_sae)

    @classmethod
    def of_mask(cls, mask: Tensor) -> SparsePattern:
        """The pattern of the true entries of a mask `[N, F]`."""
        rows, indices = mask.nonzero(as_tuple=True)
        return cls(indices, _offsets(rows, mask.shape[0]), mask.shape[1])

    @property
    def num_tokens(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def rows(self) -> Tensor:
        """`[M]`: the token of each pair."""
        return torch.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs gathered by feature: their order `[M]` and tokens `[M]`, and where each feature begins `[F]`."""
        features, order = torch.sort(self.indices, stable=True)
        return order, self.rows[order], _offsets(features, self.d_sae)[:-1]

    @property
    def is_dense(self) -> bool:
        return self.indices.numel() > DENSE_ABOVE * self.num_tokens * self.d_sae

    def select(self, chosen: Tensor) -> SparsePattern:
        """The pairs where the mask `chosen` `[M]` is true."""
        rows = self.rows[chosen]
        return SparsePattern(self.indices[chosen], _offsets(rows, self.num_tokens), self.d_sae)

    def dense(self, values: Tensor) -> Tensor:
        """`[N, F]`: the values at their places, zero elsewhere."""
        out = values.new_zeros(self.num_tokens, self.d_sae)
        return out.index_put((self.rows, self.indices), values)

    def combine(self, values: Tensor, weight: Tensor) -> Tensor:
        """P @ weight: `[N, D]`, for each token the sum of its features' rows of `weight` `[F, D]` times its values."""
        if self.is_dense:
            return self.dense(values) @ weight
        return _weighted_sums(weight, self.indices, self.offsets[:-1], values)

    def scatter(self, values: Tensor, tokens: Tensor) -> Tensor:
        """P.T @ tokens: `[F, D]`, for each feature the sum of its tokens' rows `[D]` of `tokens` times its values."""
        if self.is_dense:
            return self.dense(values).T @ tokens
        order, rows, begins = self.by_feature
        return _weighted_sums(tokens, rows, begins, values[order])

    def count(self, values: Tensor | None = None) -> Tensor:
        """`[F]`: how often each feature is active, or the sum of its values."""
        if values is None:
            return torch.bincount(self.indices, minlength=self.d_sae)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.bincount(self.indices, weights=wide, minlength=self.d_sae).to(values.dtype)

    def dot(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """(tokens @ weight.T) on P: `[M]`, for each pair the inner product of its token's and its feature's row."""
        if self.is_dense:
            return (tokens @ weight.T)[self.rows, self.indices]
        # What embedding_bag's backward calls for the gradient of its per-sample weights.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            tokens.contiguous(), weight, self.indices, self.offsets[:-1], self.rows, 0
        )


@dataclass(frozen=True)
class SparseLatents:
    """Latents of N tokens, most of them zero.

    Args:
        values (`Tensor`): `[M]`.
        pattern ([`SparsePattern`]): where they stand.
    """

    values: Tensor
    pattern: SparsePattern

    @property
    def indices(self) -> Tensor:
        """`[M]` int64: the feature of each value."""
        return self.pattern.indices

    @property
    def offsets(self) -> Tensor:
        """`[N + 1]` int64: token n has the values `offsets[n]:offsets[n + 1]`."""
        return self.pattern.offsets

    @property
    def d_sae(self) -> int:
        return self.pattern.d_sae

    def dense(self) -> Tensor:
        """`[N, F]`."""
        return self.pattern.dense(self.values)

    def nonzero(self) -> SparseLatents:
        """The latents without the pairs whose value is zero."""
        chosen = self.values != 0
        return SparseLatents(self.values[chosen], self.pattern.select(chosen))


def linear_at(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: SparsePattern, values: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` at the pairs of a pattern, with gradients that only these pairs contribute to.

    Args:
        x (`Tensor`): `[N, D]`.
        weight (`Tensor`): `[F, D]`.
        bias (`Tensor`, *optional*): `[F]`.
        pattern ([`SparsePattern`]): of N tokens and F features.
        values (`Tensor`, *optional*): `[M]`, the result, where it is known from choosing the pattern.

    Returns:
        `Tensor`: `[M]`.
    """
    return _LinearAt.apply(x, weight, bias, pattern, values)


def decode(values: Tensor, weight: Tensor, pattern: SparsePattern) -> Tensor:
    """`latents @ weight` by gathering the rows of active features.

    Args:
        values (`Tensor`): `[M]`.
        weight (`Tensor`): `[F, D]`.
        pattern ([`SparsePattern`]): where the values stand.

    Returns:
        `Tensor`: `[N, D]`.
    """
    return _Decode.apply(values, weight, pattern)


class _LinearAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: SparsePattern, values: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pattern = pattern
        if values is not None:
            return values.clone()
        values = pattern.dot(x, weight)
        return values if bias is None else values + bias[pattern.indices]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (
            ctx.pattern.combine(grad, weight) if needs_x else None,
            ctx.pattern.scatter(grad, x) if needs_weight else None,
            ctx.pattern.count(grad) if needs_bias else None,
            None,
            None,
        )


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: SparsePattern) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.pattern = pattern
        return pattern.combine(values, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors
        grad_values = ctx.pattern.dot(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = ctx.pattern.scatter(values, grad) if ctx.needs_input_grad[1] else None
        return grad_values, grad_weight, None


def _weighted_sums(table: Tensor, indices: Tensor, begins: Tensor, weights: Tensor) -> Tensor:
    """Sums of rows of `table`: bag b adds `weights[i] * table[indices[i]]` from `begins[b]` to the next begin."""
    return F.embedding_bag(indices, table, begins, mode="sum", per_sample_weights=weights.to(table.dtype))


def _offsets(sorted_keys: Tensor, num_keys: int) -> Tensor:
    """`[num_keys + 1]`: where each key begins in a sorted list, and its end."""
    counts = torch.bincount(sorted_keys, minlength=num_keys)
    return F.pad(counts.cumsum(0), (1, 0))
