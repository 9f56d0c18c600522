"""Where a token stands: added to the embeddings, turned into q and k, or added to the scores. They combine.

A variant named `x` is switched on by the configuration's `use_x_embeddings`. Its class says by `place` where it acts:
"embedding" (`forward(position_ids)` is added to the embeddings), "rotation" (`forward(position_ids, dim, dtype)` gives
the cosines and sines) or "scores" (one per layer; `forward(queries, keys, position_ids)` is added to the scores).

Shapes: B batch, S queries, K keys, E `n_embd`, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .costs import Ops
from .registry import Component, register


class Position(Component):
    """Base of the positions."""

    place: str


@register("position", "abs_pos")
class AbsolutePositions(Position):
    """A learned vector for each of the `block_size` positions."""

    place = "embedding"

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__()
        self.block_size, self.n_embd = config.block_size, config.n_embd
        self.wpe = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.wpe(position_ids)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return Ops(add=tokens * self.n_embd)


@register("position", "rotary")
class RotaryPositions(Position):
    """Pairs (x_d, x_{d + D/2}) of q and k turn by position * theta^(-2d/D) (arXiv 2104.09864)."""

    place = "rotation"

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__()
        self.theta = config.rope_theta
        self.block_size = config.block_size
        # Not buffers: they are made again from theta wherever the model goes, and neither saved nor cast.
        self._tables: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def forward(self, position_ids: Tensor, dim: int, dtype: torch.dtype, longest: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[B or 1, 1, S, dim]`.

        Args:
            position_ids (`Tensor`): `[B or 1, S]`.
            dim (`int`): D, even.
            dtype (`torch.dtype`): of the results.
            longest (`int`): no position id is larger.
        """
        table = self._table(dim, dtype, position_ids.device, longest)
        cos, sin = table[:, position_ids].unsqueeze(2)
        return cos, sin

    def _table(self, dim: int, dtype: torch.dtype, device: torch.device, longest: int) -> Tensor:
        key = (dim, dtype, device)
        table = self._tables.get(key)
        if table is None or table.shape[1] <= longest:
            length = max(self.block_size, 2 * longest)
            table = self._tables[key] = rotary_table(dim, length, self.theta, device).to(dtype)
        return table


def rotary_table(dim: int, length: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and sines `[2, length, dim]` in float64, of the half-rotation layout; the first half's sines negated."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device=device), theta**-exponents)
    sin = angles.sin()
    return torch.stack((angles.cos().repeat(1, 2), torch.cat((-sin, sin), dim=-1)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns `[B, H, S, D]` by tables of [`RotaryPositions`]."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


@register("position", "fire")
class FirePositions(Position):
    """FIRE: an MLP of how far a key is, relative to how far one could be (arXiv 2310.04418, equation 2).

    bias_h(i, j) = MLP(psi(i - j) / psi(max(i, L)))_h, psi(x) = log(c x + b), with c and L learned. |c| and |L| are
    what counts, so that a step of the optimiser past zero gives no NaN.
    """

    place = "scores"

    def __init__(self, config: Any, layer_idx: int = 0):
        super().__init__()
        self.n_head, self.width = config.n_head, config.fire_mlp_width
        self.log_bias, self.init_c, self.init_L = config.fire_log_bias, config.fire_init_c, config.fire_init_L
        self.mlp = nn.Sequential(nn.Linear(1, self.width), nn.ReLU(), nn.Linear(self.width, self.n_head))
        self.c = nn.Parameter(torch.tensor([float(self.init_c)]))
        self.L_multiplier = nn.Parameter(torch.ones(1))

    def init_parameters(self) -> None:
        init.constant_(self.c, self.init_c)
        init.ones_(self.L_multiplier)

    def forward(self, queries: Tensor, keys: Tensor, position_ids: Tensor) -> Tensor:
        """The bias `[B or 1, H, S, K]`; of keys after their query it is that of distance 0.

        Args:
            queries (`Tensor`): `[S]`, indices in the sequence with its padding.
            keys (`Tensor`): `[K]`, likewise.
            position_ids (`Tensor`): `[B or 1, S]`, i.
        """
        dtype = self.c.dtype
        distance = (queries[:, None] - keys[None, :]).clamp(min=0)
        length = (self.L_multiplier * self.init_L).abs()
        if bool(position_ids.max() <= length):  # then max(i, L) = L: a bias for each distance, not for each pair
            distances = torch.arange(int(distance.max()) + 1, device=distance.device, dtype=dtype)
            by_distance = self.mlp((self._psi(distances) / self._psi(length))[:, None])
            return by_distance[distance].movedim(-1, 0)[None]
        longest = torch.maximum(position_ids.to(dtype), length)
        ratio = self._psi(distance.to(dtype)) / self._psi(longest)[..., None]
        return self.mlp(ratio[..., None]).movedim(-1, 1)

    def _psi(self, x: Tensor) -> Tensor:
        return torch.log(self.c.abs() * x + self.log_bias)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        """Of all heads: the MLP looks at each pair once. psi(max(i, L)) is once per query."""
        hidden = Ops(mac=self.width + self.width * self.n_head, add=self.width + self.n_head, max=self.width)
        psi = Ops(mul=1, add=1, log=1)
        return pairs * (hidden + psi + Ops(mul=1) + Ops(add=self.n_head)) + tokens * (psi + Ops(max=1, div=1))
