"""Mixing of tokens by a state of fixed size: linear attention, and the Mamba-1 head.

Training goes through chunks of the sequence at once, generation through one token at a time; both by the same
functions, so that they agree.

Shapes: B batch, S tokens, H heads, D head size, V value size, C channels, N state size, E `n_embd`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .attention import TokenMixer
from .caching import recurrent_layer
from .context import Context
from .costs import Ops
from .linear import build_linear, linear_ops
from .registry import register


LINEAR_CHUNK = 64
SCAN_CHUNK = 16
STATE_BYTES = 4  # of a number in a state: sums over thousands of tokens are kept in float32


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, if they are narrower."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} + k_t [v_t, 1]^T and y_t = q_t S_t[:-1] / q_t S_t[-1], chunk by chunk.

    Source: arXiv 2006.16236, equations 16-20.

    Args:
        q, k (`Tensor`): `[B, H, S, D]`, after the feature map: not negative. A token with k = 0 leaves no trace.
        v (`Tensor`): `[B, H, S, V]`.
        state (`Tensor`, *optional*): `[B, H, D, V + 1]` before the first token; zero if None.

    Returns:
        y `[B, H, S, V]`, zero where nothing has been seen, and the state after the last token.
    """
    v = F.pad(v, (0, 1), value=1.0)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    sums = []
    for q_c, k_c, v_c in zip(
        q.split(LINEAR_CHUNK, 2), k.split(LINEAR_CHUNK, 2), v.split(LINEAR_CHUNK, 2), strict=True
    ):
        within = (q_c @ k_c.transpose(-1, -2)).tril() @ v_c
        sums.append(within + q_c @ state)
        state = state + k_c.transpose(-1, -2) @ v_c
    total = torch.cat(sums, dim=2)
    values, weight = total[..., :-1], total[..., -1:]
    return values / weight.masked_fill(weight == 0, 1.0), state


def linear_recurrence(decay: Tensor, inputs: Tensor, state: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """h_t = decay_t h_{t-1} + inputs_t, element by element, for all t.

    Inside chunks by doubling (each pass joins intervals twice as long), from chunk to chunk one after the other. Only
    products of decays are formed, never quotients, so that nothing overflows.

    Args:
        decay, inputs (`Tensor`): `[B, S, ...]`.
        state (`Tensor`): `[B, ...]`, h before the first step.
        chunk (`int`, *optional*): steps in a chunk; default `SCAN_CHUNK`, but 1 on a CPU, where a state that stays in
            the cache is worth ten times more than the steps that are saved.

    Returns:
        h `[B, S, ...]`, and the last of them.
    """
    steps = decay.shape[1]
    if steps == 1:
        state = decay[:, 0] * state + inputs[:, 0]
        return state[:, None], state
    chunk = min(chunk or (1 if decay.device.type == "cpu" else SCAN_CHUNK), steps)
    padding = -steps % chunk
    if padding:  # steps that keep the state
        decay = torch.cat((decay, torch.ones_like(decay[:, :padding])), dim=1)
        inputs = torch.cat((inputs, torch.zeros_like(inputs[:, :padding])), dim=1)
    decay, inputs = (x.unflatten(1, (-1, chunk)) for x in (decay, inputs))
    reach = 1
    while reach < chunk:
        joined = inputs[:, :, reach:] + decay[:, :, reach:] * inputs[:, :, :-reach]
        inputs = torch.cat((inputs[:, :, :reach], joined), dim=2)
        decay = torch.cat((decay[:, :, :reach], decay[:, :, reach:] * decay[:, :, :-reach]), dim=2)
        reach *= 2
    results = []
    for d, x in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        h = x + d * state[:, None]
        state = h[:, -1]
        results.append(h)
    return torch.cat(results, dim=1)[:, :steps], state


@register("attention", "linear")
class LinearAttention(TokenMixer):
    """Attention with weights phi(q) . phi(k), phi = elu + 1, in a state of D x (D + 1) numbers a head."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.n_head, self.head_dim = config.n_head, config.n_embd // config.n_head
        self.c_attn = build_linear(config, "linear_variant_attn", layer_idx, config.n_embd, 3 * config.n_embd)
        self.c_proj = build_linear(
            config, "linear_variant_attn_proj", layer_idx, config.n_embd, config.n_embd, residual=True
        )

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, None]:
        batch, tokens, n_embd = x.shape
        qkv = self.c_attn(x).view(batch, tokens, 3, self.n_head, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if context.token_mask is not None:
            k = k * context.token_mask[:, None, :, None].to(k.dtype)
        cache = recurrent_layer(past_key_values, self.layer_idx)
        with torch.autocast(x.device.type, enabled=False):
            y, state = linear_attention(*_wide(q, k, v), cache.states.get("kv") if cache is not None else None)
        if cache is not None:
            cache.advance(tokens, kv=state)
        y = y.to(v.dtype).transpose(1, 2).reshape(batch, tokens, n_embd)
        return self.drop(self.c_proj(y)), None

    def state_bytes(self, context: int, bytes_per_number: int) -> int:
        return self.n_head * self.head_dim * (self.head_dim + 1) * max(bytes_per_number, STATE_BYTES)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        n, d = self.n_head, self.head_dim
        features = Ops(exp=1, add=1, max=1) * (2 * n * d * tokens)
        # The state's update and its reading; the column of ones takes additions to update and products to read.
        state = Ops(mac=2 * d * d + d, add=d)
        divided = Ops(div=1, mul=d)
        return (
            linear_ops(self.c_attn, tokens)
            + features
            + (state + divided) * (n * tokens)
            + linear_ops(self.c_proj, tokens)
        )


@register("attention", "ssm")
class SelectiveStateSpace(TokenMixer):
    """The Mamba-1 head of Hymba (arXiv 2312.00752, algorithm 2; arXiv 2411.13676).

    u, z = W_in x; u = SiLU(causal depthwise conv(u)); Delta, B, C = W_x u, each through an RMSNorm;
    Delta = softplus(W_dt Delta + b); A = -exp(A_log); h_t = e^(Delta_t A) h_{t-1} + Delta_t B_t u_t;
    y = C_t . h_t + D u_t; out = W_out RMSNorm(y SiLU(z)).
    """

    counts_padding = True  # in the convolution

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.channels = config.ssm_mamba_expand * config.n_embd
        self.kernel, self.d_state, self.rank = config.ssm_conv_kernel_size, config.ssm_d_state, config.ssm_dt_rank
        bias, eps = config.ssm_io_bias, config.norm_eps
        attn = "linear_variant_attn"
        self.in_proj = build_linear(config, attn, layer_idx, config.n_embd, 2 * self.channels, bias=bias)
        self.conv = nn.Conv1d(self.channels, self.channels, self.kernel, groups=self.channels)
        self.x_proj = build_linear(config, attn, layer_idx, self.channels, self.rank + 2 * self.d_state, bias=False)
        self.dt_norm = nn.RMSNorm(self.rank, eps=eps)
        self.b_norm = nn.RMSNorm(self.d_state, eps=eps)
        self.c_norm = nn.RMSNorm(self.d_state, eps=eps)
        self.dt_weight = nn.Parameter(torch.empty(self.channels, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(self.channels))
        self.A_log = nn.Parameter(torch.empty(self.channels, self.d_state))
        self.D = nn.Parameter(torch.ones(self.channels))
        self.out_norm = nn.RMSNorm(self.channels, eps=eps)
        self.out_proj = build_linear(
            config, "linear_variant_attn_proj", layer_idx, self.channels, config.n_embd, bias=bias, residual=True
        )

    def init_parameters(self) -> None:
        """A = -1 ... -N; Delta starts between 0.001 and 0.1, evenly in its logarithm over the channels.

        The convolution starts as torch has it: at a standard deviation of 0.02 its few taps would silence the layer.
        """
        init.uniform_(self.conv.weight, -(self.kernel**-0.5), self.kernel**-0.5)
        init.normal_(self.dt_weight, std=self.rank**-0.5)
        start = torch.logspace(math.log10(1e-3), math.log10(0.1), self.channels)
        init.copy_(self.dt_bias, start + torch.log(-torch.expm1(-start)))  # softplus of it is `start`
        init.copy_(self.A_log, torch.arange(1.0, self.d_state + 1).log().expand(self.channels, -1))
        init.ones_(self.D)

    def forward(self, x: Tensor, context: Context, past_key_values: Cache | None = None) -> tuple[Tensor, None]:
        tokens, mask = x.shape[1], context.token_mask
        cache = recurrent_layer(past_key_values, self.layer_idx)
        states = cache.states if cache is not None else {}
        u, z = self.in_proj(x).chunk(2, dim=-1)
        if mask is not None:
            u = u * mask[..., None].to(u.dtype)
        past = states.get("conv")
        past = u.new_zeros(u.shape[0], self.kernel - 1, self.channels) if past is None else past
        seen = torch.cat((past, u), dim=1)
        u = F.silu(self.conv(seen.transpose(1, 2)).transpose(1, 2))
        chosen = self.x_proj(u).to(self.D.dtype)  # the norms' own, also under autocast
        delta, b, c = chosen.split((self.rank, self.d_state, self.d_state), dim=-1)
        delta, b, c = self.dt_norm(delta), self.b_norm(b), self.c_norm(c)
        with torch.autocast(x.device.type, enabled=False):
            y, state = self._scan(*_wide(u, delta, b, c), mask, states.get("ssm"))
        y = y.to(self.D.dtype)
        if cache is not None:
            cache.advance(tokens, conv=seen[:, seen.shape[1] - self.kernel + 1 :], ssm=state)
        return self.drop(self.out_proj(self.out_norm(y * F.silu(z)))), None

    def _scan(
        self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, mask: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y `[B, S, C]` and the last state `[B, C, N]`, for u `[B, S, C]` after the convolution and what it chooses.

        In float32 at least: a decay of e^-0.001 is 1 in bfloat16, and a sum of a thousand terms grows no more.
        """
        dt_weight, dt_bias, a_log, skip = _wide(self.dt_weight, self.dt_bias, self.A_log, self.D)
        delta = F.softplus(F.linear(delta, dt_weight, dt_bias))
        if mask is not None:
            delta = delta * mask[..., None].to(delta.dtype)  # no time passes at padding: the state stays
        decay = torch.exp(delta[..., None] * -torch.exp(a_log))
        inputs = (delta * u)[..., None] * b[:, :, None, :]
        state = torch.zeros_like(inputs[:, 0]) if state is None else state
        h, state = linear_recurrence(decay, inputs, state)
        return torch.einsum("bscn,bsn->bsc", h, c) + skip * u, state

    def state_bytes(self, context: int, bytes_per_number: int) -> int:
        conv, state = (self.kernel - 1) * bytes_per_number, self.d_state * max(bytes_per_number, STATE_BYTES)
        return self.channels * (conv + state)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        c, n, r = self.channels, self.d_state, self.rank
        norms = sum((Ops(mul=3 * size + 1, add=size + 1, sqrt=1, div=1) for size in (r, n, n, c)), Ops())
        silus = 2 * c * Ops(exp=1, add=1, div=1)
        conv = Ops(mac=c * self.kernel, add=c)
        delta = Ops(mac=c * r, add=c) + c * Ops(exp=1, add=1, log=1)
        scan = Ops(mul=3 * c * n, exp=c * n, add=c * n) + Ops(mul=c)  # -exp(A_log) is a constant of the trained model
        out = Ops(mac=c * n, mul=c, add=c) + Ops(mul=c)
        own = norms + silus + conv + delta + scan + out
        return (
            linear_ops(self.in_proj, tokens)
            + linear_ops(self.x_proj, tokens)
            + tokens * own
            + linear_ops(self.out_proj, tokens)
        )
