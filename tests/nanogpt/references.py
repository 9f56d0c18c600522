"""Naive references for the parts of the nanoGPT variants, written as loops from the formulas of the papers.

They know nothing of the package: plain tensors in, plain tensors out, one score, channel or token at a time, at the
precision of what they are given (tests give float64). Letters: B rows, H query heads, G key heads, S queries, T keys,
D head width, E model width, I inner width of ssm, N its state size, R rank of Δ, K taps of the convolution.

A weighting takes scores [B, H, S, T] and `allowed` [B or 1, 1 or H, S, T]; what is not allowed weighs exactly 0, and a
row in which nothing is allowed is all 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


Weighting = Callable[..., Tensor]


def per_row(rule: Callable[[list[Tensor], int], list[Tensor]], scores: Tensor, allowed: Tensor) -> Tensor:
    """Applies `rule(allowed scores of one row, head) -> their weights` to every row."""
    allowed = allowed.expand_as(scores)
    rows = []
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            for i in range(scores.shape[2]):
                columns = [j for j in range(scores.shape[3]) if allowed[b, h, i, j]]
                weights = rule([scores[b, h, i, j] for j in columns], h) if columns else []
                found = dict(zip(columns, weights, strict=True))
                rows.append(torch.stack([found.get(j, scores.new_zeros(())) for j in range(scores.shape[3])]))
    return torch.stack(rows).view(scores.shape)


# ---- weightings of attention


def softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    return softmax_off_by_one(scores, allowed, base=math.e, offset=0.0)


def softermax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax to the base 2."""
    return softmax_off_by_one(scores, allowed, base=2.0, offset=0.0)


def softmax_off_by_one(scores: Tensor, allowed: Tensor, base: float, offset: float | Tensor) -> Tensor:
    """base^s_j / (offset + Σ_k base^s_k): strongermax; `offset` may be a tensor, of one number or one per head."""

    def rule(row: list[Tensor], head: int) -> list[Tensor]:
        powers = [base**s for s in row]
        extra = offset.flatten()[head % offset.numel()] if isinstance(offset, Tensor) else offset
        total = sum(powers) + extra
        return [p / total for p in powers]

    return per_row(rule, scores, allowed)


def flash_lobo(scores: Tensor, allowed: Tensor, log_constant: float | Tensor) -> Tensor:
    """e^s_j / (C + Σ_k e^s_k), C = e^log_constant, one or one per head."""
    constant = log_constant.exp() if isinstance(log_constant, Tensor) else math.exp(log_constant)
    return softmax_off_by_one(scores, allowed, math.e, constant)


def consmax(scores: Tensor, allowed: Tensor, beta: Tensor, gamma: Tensor, base: float = math.e) -> Tensor:
    """b^(s - β) / γ with one β and γ, without any sum over the row."""
    return per_row(lambda row, _: [base ** (s - beta) / gamma for s in row], scores, allowed)


def consmax_v2(
    scores: Tensor,
    allowed: Tensor,
    beta: Tensor,
    gamma: Tensor,
    base: float = math.e,
    clamp: float | None = None,
) -> Tensor:
    """consmax with β [H] and γ [H], and with s - β cut at `clamp` from above."""

    def rule(row: list[Tensor], head: int) -> list[Tensor]:
        shifted = [s - beta[head] for s in row]
        if clamp is not None:
            shifted = [x if x.item() < clamp else torch.full_like(x, clamp) for x in shifted]
        return [base**x / gamma[head] for x in shifted]

    return per_row(rule, scores, allowed)


def sigmoidmax(scores: Tensor, allowed: Tensor, divisor: float) -> Tensor:
    return per_row(lambda row, _: [1 / (1 + (-s).exp()) / divisor for s in row], scores, allowed)


def relumax(scores: Tensor, allowed: Tensor, divisor: float) -> Tensor:
    return per_row(lambda row, _: [s * float(s > 0) / divisor for s in row], scores, allowed)


def relu2max(scores: Tensor, allowed: Tensor, divisor: float) -> Tensor:
    return per_row(lambda row, _: [s * s * float(s > 0) / divisor for s in row], scores, allowed)


def softplus(scores: Tensor, allowed: Tensor, divisor: float) -> Tensor:
    return per_row(lambda row, _: [(1 + s.exp()).log() / divisor for s in row], scores, allowed)


def squareplus(scores: Tensor, allowed: Tensor, divisor: float) -> Tensor:
    return per_row(lambda row, _: [(s + (s * s + 4).sqrt()) / 2 / divisor for s in row], scores, allowed)


def polymax(scores: Tensor, allowed: Tensor, x0: float, y0: float, power: float, divisor: float) -> Tensor:
    """0 left of x0 < 0, a line from (x0, 0) to (0, y0), then s^power + y0."""

    def one(s: Tensor) -> Tensor:
        if s.item() < x0:
            return 0 * s
        return (y0 - s * y0 / x0 if s.item() < 0 else s**power + y0) / divisor

    return per_row(lambda row, _: [one(s) for s in row], scores, allowed)


def sigsoftmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """e^s·σ(s) over its sum."""

    def rule(row: list[Tensor], _: int) -> list[Tensor]:
        terms = [s.exp() / (1 + (-s).exp()) for s in row]
        return [term / sum(terms) for term in terms]

    return per_row(rule, scores, allowed)


# ---- attention as a whole


def causal_window(queries: int, keys: int, window: int | None = None) -> Tensor:
    """[1, 1, S, T] of which keys each query may see; the last query stands at the last key."""
    allowed = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    for row in range(queries):
        i = row + keys - queries
        for j in range(keys):
            allowed[0, 0, row, j] = j <= i and (window is None or i - j < window)
    return allowed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    weighting: Weighting = softmax,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """q [B, H, S, D], k and v [B, G, T, D], allowed [B or 1, 1, S, T], bias [H, S, T]; head h reads group hG // H.

    scores = cap·tanh(scale·q·k / cap) + bias.
    """
    batch, heads, queries, width = q.shape
    share = heads // k.shape[1]
    scale = width**-0.5 if scale is None else scale
    scores = q.new_zeros(batch, heads, queries, k.shape[2])
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in range(k.shape[2]):
                    s = scale * (q[b, h, i] * k[b, h // share, j]).sum()
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    rows.append(s if bias is None else s + bias[h, i, j])
    scores = torch.stack(rows).view(scores.shape)
    weights = weighting(scores, allowed)
    out = q.new_zeros(batch, heads, queries, v.shape[-1])
    for h in range(heads):
        for j in range(k.shape[2]):
            out[:, h] = out[:, h] + weights[:, h, :, j, None] * v[:, h // share, None, j]
    return out


def linear_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    """S_t = S_{t-1} + φ(k_t)[v_t, 1]ᵀ, y_t = φ(q_t)S_t[:-1] / φ(q_t)S_t[-1], φ = elu + 1, token by token.

    q, k, v [B, H, S, D]; tokens where `keep` [B, S] is False add nothing.
    """

    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    batch, heads, length, width = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            state, norm = q.new_zeros(width, v.shape[-1]), q.new_zeros(width)
            for t in range(length):
                if keep is None or keep[b, t]:
                    state = state + torch.outer(phi(k[b, h, t]), v[b, h, t])
                    norm = norm + phi(k[b, h, t])
                total = phi(q[b, h, t]) @ norm
                rows.append(phi(q[b, h, t]) @ state / total if total.item() > 0 else v.new_zeros(v.shape[-1]))
    return torch.stack(rows).view(batch, heads, length, v.shape[-1])


# ---- positions


def rotary(x: Tensor, positions: Sequence[int], base: float = 10000.0) -> Tensor:
    """x [B, H, S, D]; channel d turns with channel d + D/2 by the angle position · base^(-2d/D)."""
    out, half = torch.zeros_like(x), x.shape[-1] // 2
    for s, position in enumerate(positions):
        for d in range(half):
            angle = position * base ** (-2 * d / x.shape[-1])
            first, second = x[:, :, s, d], x[:, :, s, d + half]
            out[:, :, s, d] = first * math.cos(angle) - second * math.sin(angle)
            out[:, :, s, d + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def fire(
    queries: Sequence[int],
    keys: Sequence[int],
    layers: Sequence[tuple[Tensor, Tensor]],
    c: Tensor,
    threshold: Tensor,
    b: float = 1.0,
) -> Tensor:
    """Bias [H, S, T] = MLP(ψ(i - j) / ψ(max(i, L))), ψ(x) = log(c·x + b); `queries` and `keys` are absolute positions.

    `layers` are (weight, bias) of the MLP's linear maps, with ReLU between; keys after the query get 0.
    """

    def psi(x: Tensor | float) -> Tensor:
        return torch.log(c * x + b)

    heads = layers[-1][0].shape[0]
    rows = []
    for i in queries:
        for j in keys:
            if j > i:
                rows.append(c.new_zeros(heads))
                continue
            x = (psi(float(i - j)) / psi(torch.maximum(torch.as_tensor(float(i)).to(c), threshold))).reshape(1)
            for depth, (weight, shift) in enumerate(layers):
                x = weight @ x + shift
                x = x if depth == len(layers) - 1 else x * (x > 0)
            rows.append(x)
    return torch.stack(rows).view(len(queries), len(keys), heads).permute(2, 0, 1)


# ---- per token


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = [row / ((row * row).sum() / row.numel() + eps).sqrt() * weight for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view_as(x)


def layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        mean = row.sum() / row.numel()
        variance = ((row - mean) ** 2).sum() / row.numel()
        row = (row - mean) / (variance + eps).sqrt()
        row = row if weight is None else row * weight
        rows.append(row if bias is None else row + bias)
    return torch.stack(rows).view_as(x)


def partial_rmsnorm(x: Tensor, weight: Tensor, eps: float, measured: int) -> Tensor:
    """RMSNorm by the mean square of the first numbers alone."""
    rows = [row / ((row[:measured] ** 2).sum() / measured + eps).sqrt() * weight for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view_as(x)


def on_sphere(x: Tensor, radius: float) -> Tensor:
    """x of length `radius`."""
    return torch.stack([row / (row * row).sum().sqrt() * radius for row in x.reshape(-1, x.shape[-1])]).view_as(x)


def dact(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """γ·tanh(αx) + β."""
    e = (2 * alpha * x).exp()
    return gamma * (e - 1) / (e + 1) + beta


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor] = silu) -> Tensor:
    """W_o(act(W_1 x) ⊙ W_2 x)."""
    rows = [down @ (act(gate @ row) * (up @ row)) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(*x.shape[:-1], down.shape[0])


def legendre(x: Tensor, degree: int) -> Tensor:
    """P_degree by its explicit sum, 2^-n Σ_k C(n, k)² (x - 1)^(n-k) (x + 1)^k."""
    terms = [math.comb(degree, k) ** 2 * (x - 1) ** (degree - k) * (x + 1) ** k for k in range(degree + 1)]
    return sum(terms) / 2**degree


def kan_layer(
    x: Tensor,
    base: Tensor,
    poly: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    act: Callable[[Tensor], Tensor] = silu,
) -> Tensor:
    """act(LN(W_b·act(x) + Σ_ik W_p[·, i, k] P_k(tanh x_i))); base [O, I], poly [O, I, K + 1]."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        y = base @ act(row)
        for i in range(row.numel()):
            for degree in range(poly.shape[-1]):
                y = y + poly[:, i, degree] * legendre(torch.tanh(row[i]), degree)
        rows.append(y)
    y = torch.stack(rows).view(*x.shape[:-1], base.shape[0])
    return act(layernorm(y, norm_weight, norm_bias, eps))


# ---- state space


def ssm(x: Tensor, p: dict[str, Tensor], eps: float, keep: Tensor | None = None) -> Tensor:
    """Mamba-1 head with normalised Δ, B, C, one token after the other. x [B, S, E]; where `keep` is False no token is.

    p: in_proj [2I, E] (u, then z), conv_weight [I, K], conv_bias [I], x_proj [R + 2N, I] (Δ, B, C), dt_norm [R],
    b_norm [N], c_norm [N], dt_proj [I, R], dt_bias [I], A_log [I, N], D [I], out_norm [I], out_proj [E, I].
    """
    inner, taps = p["conv_weight"].shape
    rank, state_size = p["dt_proj"].shape[1], p["A_log"].shape[1]
    rows = []
    for b in range(x.shape[0]):
        history = [x.new_zeros(inner) for _ in range(taps)]
        h = x.new_zeros(inner, state_size)
        for t in range(x.shape[1]):
            if keep is not None and not keep[b, t]:
                rows.append(x.new_zeros(x.shape[2]))
                continue
            u, z = (p["in_proj"] @ x[b, t]).split(inner)
            history = [*history[1:], u]
            u = sum(p["conv_weight"][:, tap] * history[tap] for tap in range(taps)) + p["conv_bias"]
            u = silu(u)
            delta, b_t, c_t = (p["x_proj"] @ u).split([rank, state_size, state_size])
            delta, b_t, c_t = (
                rmsnorm(one[None], p[name], eps)[0]
                for one, name in ((delta, "dt_norm"), (b_t, "b_norm"), (c_t, "c_norm"))
            )
            delta = torch.log1p((p["dt_proj"] @ delta + p["dt_bias"]).exp())
            decay = (delta[:, None] * -p["A_log"].exp()).exp()
            h = decay * h + (delta * u)[:, None] * b_t
            y = h @ c_t + p["D"] * u
            rows.append(p["out_proj"] @ rmsnorm((y * silu(z))[None], p["out_norm"], eps)[0])
    return torch.stack(rows).view_as(x)
