"""Multi-head latent attention: keys and values of all heads in one small vector per token.

Shapes: B batch, S tokens, E `n_embd`, H heads, D head size, C `mla_latent_dim`, R `mla_rotary_dim`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .attention import ScoredAttention
from .context import Context
from .costs import Ops
from .linear import build_linear, linear_ops
from .positions import rotate
from .registry import Component, register


class PerHead(Component):
    """A linear map of its own for each head: `[B, S, H, in]` to `[B, S, H, out]`."""

    def __init__(self, config: Any, in_features: int, out_features: int):
        super().__init__()
        self.std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.n_head, in_features, out_features))

    def init_parameters(self) -> None:
        init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bshi,hio->bsho", x, self.weight)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops(mac=tokens * self.weight.numel())


@register("attention", "mla")
class LatentAttention(ScoredAttention):
    """Keys W_k c and values W_v c of each head come from a latent c of C numbers, the only thing cached but R more.

    W_k is applied to the queries and W_v to the weighted sum instead, so that all heads look at the latents
    themselves: (W_k c)^T q = c^T (W_k^T q). Positions are in R numbers of each query and of one key that all heads
    share, as a rotation of c would not go through W_k.

    Source: arXiv 2405.04434, section 2.1; the absorbed form of its appendix C.
    """

    def __init__(self, config: Any, layer_idx: int):
        self.plain_dim, n_head = config.n_embd // config.n_head, config.n_head
        latent, turned = config.latent_dim, config.mla_rotary_dim if config.rotation_variant else 0
        super().__init__(config, layer_idx, head_dim=latent + turned, value_dim=latent, n_kv_group=1)
        self.rotary_dim, self.latent_dim = turned, latent
        self.scaling = (self.plain_dim + turned) ** -0.5  # of the keys that W_k would make
        self.sizes = (n_head * self.plain_dim, n_head * turned, latent, turned)
        self.c_attn = build_linear(config, "linear_variant_attn", layer_idx, config.n_embd, sum(self.sizes))
        self.latent_norm = nn.RMSNorm(latent, eps=config.norm_eps)
        self.w_k = PerHead(config, self.plain_dim, latent)
        self.w_v = PerHead(config, latent, self.plain_dim)
        self.c_proj = build_linear(
            config, "linear_variant_attn_proj", layer_idx, n_head * self.plain_dim, config.n_embd, residual=True
        )

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, Any]:
        q, q_turned, latent, k_turned = self.c_attn(x).split(self.sizes, dim=-1)
        latent = self.latent_norm(latent.to(self.latent_norm.weight.dtype))  # its own, also under autocast
        q = self.w_k(q.unflatten(-1, (self.n_head, -1)))
        k = latent.unsqueeze(2)
        if self.rotary_dim:
            q = torch.cat((q, q_turned.unflatten(-1, (self.n_head, -1))), dim=-1)
            k = torch.cat((k, k_turned.unsqueeze(2)), dim=-1)
        y, weights = self.attend(torch.cat((q, k), dim=2), latent.unsqueeze(1), context, past_key_values)
        return self.drop(self.c_proj(self.w_v(y).flatten(-2))), weights

    def turn(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        latent, turned = qk.split((self.latent_dim, self.rotary_dim), dim=-1)
        return torch.cat((latent, rotate(turned, cos, sin)), dim=-1)

    def extend(self, cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, _ = cache.update(k, v[..., :0], self.layer_idx)  # the values are in the keys
        return k, k[..., : self.latent_dim]

    def state_bytes(self, context: int, bytes_per_number: int) -> int:
        kept = context if self.window is None else min(context, self.window)
        return kept * self.head_dim * bytes_per_number

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n = self.latent_dim
        norm = Ops(mul=3 * n + 1, add=n + 1, sqrt=1, div=1) * tokens
        absorbed = self.w_k.ops(tokens) + self.w_v.ops(tokens)
        ends = linear_ops(self.c_attn, tokens) + linear_ops(self.c_proj, tokens)
        return ends + norm + absorbed + self.attention_ops(tokens, pairs)
