"""Mixing of tokens by attention: causal, with decoupled head sizes, or none.

Shapes: B batch, S queries, K keys, E `n_embd`, H heads, G key-value heads, D head size, V value size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .caching import recurrent_layer
from .context import Context
from .costs import Ops
from .linear import build_linear, linear_ops
from .positions import rotate
from .registry import Component, register, variant


class TokenMixer(Component):
    """Base of the attentions: `forward(x [B, S, E], context, past_key_values)` -> (`[B, S, E]`, weights or None)."""

    uses_keys = False  # whether it caches keys and values, and so has a window, positions and softmax
    rotary_dim = 0  # size of the heads that are rotated
    counts_padding = False  # whether padding between two tokens makes them further apart

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.dropout = config.dropout

    def state_bytes(self, context: int, bytes_per_number: int) -> int:
        """Bytes kept in the cache of one sequence of `context` tokens."""
        return 0


@register("attention", "identity")
class IdentityAttention(TokenMixer):
    """x: no mixing."""

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, None]:
        if (cache := recurrent_layer(past_key_values, self.layer_idx)) is not None:
            cache.advance(x.shape[1])  # counts the tokens
        return x, None

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops()


class QKScale(Component):
    """A learned scale of the products of normalised queries and keys.

    Source: arXiv 2010.04245, section 3: cosines are at most 1, so the scale must let one key of many win.
    """

    def __init__(self, config: Any):
        super().__init__()
        length = max(config.block_size, 2)
        self.initial = math.log2(length * length - length)
        self.weight = nn.Parameter(torch.full((1,), self.initial))

    def init_parameters(self) -> None:
        init.constant_(self.weight, self.initial)

    def forward(self, q: Tensor) -> Tensor:
        return q * self.weight


class OffByOne(Component):
    """log C of what a softmax adds to its denominator: learned once, per head, or fixed."""

    def __init__(self, config: Any, n_head: int):
        super().__init__()
        self.n_head, self.initial = n_head, config.flash_lobo_log_const
        self.log_const: nn.Parameter | None = None
        if not config.use_flash_obo_const:
            heads = n_head if config.use_flash_lobo_per_head else 1
            self.log_const = nn.Parameter(torch.full((heads,), float(self.initial)))

    def init_parameters(self) -> None:
        if self.log_const is not None:
            init.constant_(self.log_const, self.initial)

    def forward(self, q: Tensor) -> Tensor:
        """The score `[B, H, S, 1]` of the key that stands for it, for queries `[B, H, S, D]`."""
        const = self.initial if self.log_const is None else self.log_const.to(q.dtype).view(1, -1, 1, 1)
        return q.new_zeros(q.shape[0], self.n_head, q.shape[2], 1) + const


class ScoredAttention(TokenMixer):
    """Attention by scores of keys: everything after q, k and v, for heads of any size.

    Softmax goes through `scaled_dot_product_attention`, also with FIRE's bias and the learned off-by-one, which is a
    key of score log C whose value is zero. Other weightings, soft-capped scores, and `attn_implementation="eager"`
    compute their weights openly.
    """

    uses_keys = True

    def __init__(self, config: Any, layer_idx: int, head_dim: int, value_dim: int, n_kv_group: int | None = None):
        super().__init__(config, layer_idx)
        groups = n_kv_group or config.of_layer("n_kv_group", layer_idx) or config.n_head
        self.n_head, self.n_kv_group = config.n_head, groups
        self.num_key_value_groups = self.n_head // self.n_kv_group  # transformers' name, read by its attention
        self.head_dim, self.value_dim = head_dim, value_dim
        self.rotary_dim = head_dim if config.rotation_variant else 0
        self.window = config.of_layer("window_size", layer_idx)
        self.softcap = config.attn_logit_softcapping
        softmax = config.of_layer("softmax_variant_attn", layer_idx)
        self.weighting = variant("softmax", softmax)(config, layer_idx, self.n_head)
        self.is_fusable = softmax == "softmax" and self.softcap is None
        self.biases = nn.ModuleList(build_score_positions(config, layer_idx))
        self.counts_padding = self.window is not None or len(self.biases) > 0
        self.use_qk_norm = config.use_qk_norm
        self.qk_scale = QKScale(config) if config.use_qk_norm_scale else None
        self.scaling = self.head_dim**-0.5 if self.qk_scale is None else 1.0
        self.off_by_one = OffByOne(config, self.n_head) if config.use_flash_lobo else None

    def attend(self, qk: Tensor, v: Tensor, context: Context, cache: Cache | None) -> tuple[Tensor, Any]:
        """Values `[B, S, H, V]` for q and k side by side `[B, S, H + G, D]`, v `[B, G, S, V]`, and weights if open."""
        qk = qk.transpose(1, 2)
        if self.use_qk_norm:
            qk = nn.functional.normalize(qk, dim=-1, eps=1e-6)
        if self.rotary_dim:
            qk = self.turn(qk, *context.rotations[self.rotary_dim])
        q, k = qk.split((self.n_head, self.n_kv_group), dim=1)
        if self.qk_scale is not None:
            q = self.qk_scale(q)
        if cache is not None:
            k, v = self.extend(cache, k, v)
        keys, allowed = context.masks[self.window]
        bias = self._score_bias(context, keys)
        if self.is_fusable and context.sdpa is not None:
            return self._attend_fused(q, k, v, keys, allowed, bias, context)
        return self._attend_openly(q, k, v, self._explicit(allowed, context, keys), bias)

    def turn(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q and k `[B, H + G, S, D]` with their positions."""
        return rotate(qk, cos, sin)

    def extend(self, cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, after those of this forward went into the cache."""
        return cache.update(k, v, self.layer_idx)

    def _score_bias(self, context: Context, keys: Tensor) -> Tensor | None:
        biases = [position(context.queries, keys, context.position_ids) for position in self.biases]
        return sum(biases) if biases else None

    @staticmethod
    def _explicit(allowed: Tensor | None, context: Context, keys: Tensor) -> Tensor:
        return (context.queries[:, None] >= keys[None, :])[None, None] if allowed is None else allowed

    def _attend_fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        allowed: Tensor | None,
        bias: Tensor | None,
        context: Context,
    ) -> tuple[Tensor, None]:
        mask = allowed
        if bias is not None or self.off_by_one is not None:
            allowed = self._explicit(allowed, context, keys)
            bias = q.new_zeros(1, 1, 1, 1) if bias is None else bias.to(q.dtype)
            # The smallest finite number, not -inf: a row of padding keeps finite weights and gradients.
            mask = torch.where(allowed, bias, torch.finfo(q.dtype).min)
        if self.off_by_one is not None:
            sink = self.off_by_one(q)
            mask = torch.cat((sink, mask.expand(*sink.shape[:3], -1)), dim=-1)
            k, v = (nn.functional.pad(x, (0, 0, 1, 0)) for x in (k, v))  # a key of zeros in front, and its value
        dropout = self.dropout if self.training else 0.0
        return context.sdpa(
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling, is_causal=q.shape[2] > 1 and mask is None
        )

    def _attend_openly(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.num_key_value_groups > 1:
            k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2)
        # In float32 at least: exponentials overflow half precision.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if self.off_by_one is not None:
            scores = torch.cat((self.off_by_one(q).to(scores.dtype), scores), dim=-1)
            allowed = nn.functional.pad(allowed, (1, 0), value=True)
        weights = self.weighting(scores, allowed).to(v.dtype)
        if self.off_by_one is not None:
            weights = weights[..., 1:]
        return (self.drop(weights) @ v).transpose(1, 2), weights

    def state_bytes(self, context: int, bytes_per_number: int) -> int:
        kept = context if self.window is None else min(context, self.window)
        return kept * self.n_kv_group * (self.head_dim + self.value_dim) * bytes_per_number

    def attention_ops(self, tokens: int, pairs: int) -> Ops:
        """Of [`attend`]."""
        heads, width = self.n_head + self.n_kv_group, self.head_dim
        scores = pairs * self.n_head
        scored = Ops(mac=scores * self.head_dim, mul=scores if self.qk_scale is None else 0)
        count = scored + Ops(mac=scores * self.value_dim) + self.weighting.ops(tokens * self.n_head, scores)
        if self.use_qk_norm:
            count += Ops(mul=2 * width, add=width, sqrt=1, max=1, div=1) * (tokens * heads)
        if self.qk_scale is not None:
            count += Ops(mul=tokens * self.n_head * width)
        if self.rotary_dim:
            count += Ops(mul=2 * self.rotary_dim, add=self.rotary_dim) * (tokens * heads)
        if self.softcap is not None:
            count += Ops(mul=2 * scores, tanh=scores)
        if self.off_by_one is not None:
            rows = tokens * self.n_head
            count += Ops(exp=rows, add=2 * rows, max=rows)  # one score more in each row, with no value
        return count + sum((position.ops(tokens, pairs) for position in self.biases), Ops())


def build_score_positions(config: Any, layer_idx: int) -> list[nn.Module]:
    """The positions of a layer that are added to its scores."""
    chosen = (variant("position", name) for name in config.position_variants)
    return [cls(config, layer_idx) for cls in chosen if cls.place == "scores"]


@register("attention", "causal")
class CausalAttention(ScoredAttention):
    """Multi-head attention with E / H numbers a head, and H / G heads to a pair of keys and values."""

    def __init__(self, config: Any, layer_idx: int):
        head_dim = config.n_embd // config.n_head
        super().__init__(config, layer_idx, head_dim, head_dim)
        self.sizes = (config.n_embd + self.n_kv_group * head_dim, self.n_kv_group * head_dim)
        self.c_attn = build_linear(config, "linear_variant_attn", layer_idx, config.n_embd, sum(self.sizes))
        self.c_proj = build_linear(
            config, "linear_variant_attn_proj", layer_idx, config.n_embd, config.n_embd, residual=True
        )

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, Any]:
        qk, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.c_attn(x).split(self.sizes, dim=-1))
        y, weights = self.attend(qk, v.transpose(1, 2), context, past_key_values)
        return self.drop(self.c_proj(y.reshape(x.shape))), weights

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return linear_ops(self.c_attn, tokens) + self.attention_ops(tokens, pairs) + linear_ops(self.c_proj, tokens)


@register("attention", "infinite")
class InfiniteAttention(ScoredAttention):
    """Heads of free sizes `n_qk_head_dim` and `n_v_head_dim`, whose values are summed, so that H need not divide E.

    With `use_concat_heads` they are concatenated before the output projection instead.
    """

    def __init__(self, config: Any, layer_idx: int):
        head_dim = config.n_qk_head_dim or config.n_embd // config.n_head
        super().__init__(config, layer_idx, head_dim, config.n_v_head_dim or config.n_embd // config.n_head)
        groups = self.n_kv_group
        self.sizes = ((self.n_head + groups) * head_dim, groups * self.value_dim)
        self.concat_heads = config.use_concat_heads
        out = self.value_dim * (self.n_head if self.concat_heads else 1)
        self.c_attn = build_linear(config, "linear_variant_attn", layer_idx, config.n_embd, sum(self.sizes))
        self.c_proj = build_linear(config, "linear_variant_attn_proj", layer_idx, out, config.n_embd, residual=True)

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, Any]:
        qk, v = self.c_attn(x).split(self.sizes, dim=-1)
        v = v.unflatten(-1, (-1, self.value_dim)).transpose(1, 2)
        y, weights = self.attend(qk.unflatten(-1, (-1, self.head_dim)), v, context, past_key_values)
        y = y.flatten(-2) if self.concat_heads else y.sum(-2)
        return self.drop(self.c_proj(y)), weights

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        summed = 0 if self.concat_heads else tokens * self.n_head * self.value_dim
        count = linear_ops(self.c_attn, tokens) + self.attention_ops(tokens, pairs) + linear_ops(self.c_proj, tokens)
        return count + Ops(add=summed)
