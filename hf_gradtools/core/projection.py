"""Projections of per-sample gradients to few numbers that keep inner products: bases, sketches, their seeds.

Stage one, per parameter: a gradient matrix g `[O, I]` becomes `P_outᵀ g P_in` `[k_out, k_in]`. For a matrix product
it is the sum over tokens of `(P_outᵀ output_grad)(P_inᵀ activation)ᵀ`, so g itself is never formed (LoGra, Choe et al.
2024, arXiv 2405.13954, §3.1). Stage two, optional: a sparse Johnson–Lindenstrauss sketch that adds the numbers of all
parameters into `dim` (Kane & Nelson 2014, arXiv 1012.1577; one signed slot per number).

The random bases have `E[P Pᵀ] = I` and the sketch `E[Sᵀ S] = I`, so `E⟨p_i, p_j⟩ = ⟨g_i, g_j⟩`. Everything random
comes from Philox streams keyed by a seed and a name: the same on every machine, device and number of processes,
whatever other layers there are.

Shape legend: N samples · O, I sides of a gradient matrix · k_out, k_in their ranks · D numbers of stage one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


BasisKind = Literal["orthonormal", "gaussian", "rademacher"]
BASES: tuple[BasisKind, ...] = ("orthonormal", "gaussian", "rademacher")

# (P_out [O, k_out], P_in [I, k_in]); None is the identity.
Bases = tuple[Tensor | None, Tensor | None]

_MAX_RANK = 512  # given by energy
_OVERSAMPLING, _POWER_ITERATIONS = 16, 3  # of the randomised eigenbasis, Halko et al. 2011, arXiv 0909.4061, Alg. 4.4


@dataclass(frozen=True)
class Block:
    """A parameter's share of a projection.

    Attributes:
        name: the parameter's name in the model.
        shape: (O, I) of its gradient as a matrix; a vector of d numbers is `[d, 1]`.
        ranks: (k_out, k_in).
    """

    name: str
    shape: tuple[int, int]
    ranks: tuple[int, int]

    @property
    def size(self) -> int:
        """Numbers of stage one."""
        return self.ranks[0] * self.ranks[1]


class Sketch:
    """Adds `size` numbers into `dim` slots, with random signs; every slot gets as many as any other, but for one.

    A random permutation deals the numbers out, so that collisions are as few as they can be.

    Args:
        size: numbers that come in.
        dim: numbers that go out.
        seed: of the permutation and the signs.
        name: likewise.
        device: where they are kept.
    """

    def __init__(self, size: int, dim: int, seed: int, name: str, device: torch.device | str = "cpu"):
        bits = _random_bits(2 * max(size, dim), seed, name, "sketch")
        deals = -(-size // dim)
        # Numbers beyond `size` stand for zeros, so that the last deal too goes to random slots.
        order = np.argsort(bits[:size], kind="stable")
        last = np.argsort(bits[max(size, dim) :][:dim], kind="stable")
        padded = np.full(deals * dim, size, np.int64)
        padded[: (deals - 1) * dim] = order[: (deals - 1) * dim]
        rest = order[(deals - 1) * dim :]
        padded[(deals - 1) * dim + last[: len(rest)]] = rest
        self.dim, self.deals = dim, deals
        self._order = torch.from_numpy(padded).to(device)
        self._signs = torch.from_numpy(1.0 - 2.0 * (bits[:size] & np.uint64(1)).astype(np.float32)).to(device)

    def __call__(self, values: Tensor) -> Tensor:
        """`[N, size]` to `[N, dim]`."""
        signed = torch.nn.functional.pad(values * self._signs.to(values.dtype), (0, 1))
        return signed.index_select(1, self._order).view(len(values), self.deals, self.dim).sum(1)


class Projection:
    """The linear map from gradients to `dim` numbers, given by blocks, their bases, and the sketch over them.

    Args:
        blocks: one per parameter.
        bases: of each block, by its name.
        dim: numbers of the sketch, None to keep those of all blocks side by side.
        seed: of the sketch.
        device: where the sketches are kept.

    Attributes:
        dim: numbers per sample.
        slices: without a sketch, where each block's numbers stand.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        bases: Mapping[str, Bases],
        dim: int | None,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        self.blocks = {block.name: block for block in blocks}
        self.bases = dict(bases)
        self.sketches: dict[str, Sketch] = {}
        self.slices: dict[str, slice] = {}
        if dim is None:
            ends = np.cumsum([block.size for block in blocks]).tolist()
            self.slices = {b.name: slice(end - b.size, end) for b, end in zip(blocks, ends, strict=True)}
            dim = ends[-1]
        else:
            self.sketches = {block.name: Sketch(block.size, dim, seed, block.name, device) for block in blocks}
        self.dim: int = dim

    def add(self, rows: Tensor, name: str, projected: Tensor) -> None:
        """Adds a block's stage one `[N, k_out, k_in]` to what there is of the rows `[N, dim]`."""
        flat = projected.flatten(1)
        if self.sketches:
            rows += self.sketches[name](flat)
        else:
            rows[:, self.slices[name]] += flat


def project_matrix(grads: Tensor, bases: Bases) -> Tensor:
    """`P_outᵀ g P_in` of gradients `[..., O, I]`: `[..., k_out, k_in]`."""
    out_basis, in_basis = bases
    if in_basis is not None:
        grads = grads @ in_basis.to(grads.dtype)
    return grads if out_basis is None else out_basis.to(grads.dtype).mT @ grads


def random_basis(size: int, rank: int, kind: BasisKind, seed: int, *name: str) -> Tensor | None:
    """A random basis `[size, rank]` with `E[P Pᵀ] = I`, float32; None (the identity) where `rank >= size`.

    Args:
        size: d.
        rank: k.
        kind: "gaussian" N(0, 1/k), "rademacher" ±1/√k, or "orthonormal" columns times √(d/k): least variance.
        seed: together with `name` it decides the draw.
        name: whose basis.
    """
    if rank >= size:
        return None
    if kind == "rademacher":
        bits = np.unpackbits(_random_bits(-(-size * rank // 64), seed, *name).view(np.uint8))[: size * rank]
        basis = (1.0 - 2.0 * bits.astype(np.float64)).reshape(size, rank) / math.sqrt(rank)
    else:
        basis = _gaussian(size * rank, seed, *name).reshape(size, rank)
        if kind == "gaussian":
            basis /= math.sqrt(rank)
        else:
            basis = _orthonormal(basis) * math.sqrt(size / rank)
    return torch.from_numpy(basis.astype(np.float32))


def principal_basis(tokens: Tensor, rank: int, seed: int, *name: str) -> Tensor | None:
    """Orthonormal basis `[d, rank]` of the directions in which tokens `[T, d]` have most energy (uncentred PCA).

    It keeps the inner products of gradients made of such tokens better than a random basis, but what lies outside is
    lost, not estimated: it is not unbiased. None (the identity) where `rank >= d`.
    """
    size = tokens.shape[1]
    if rank >= size:
        return None
    tokens = tokens.double()
    width = min(size, rank + _OVERSAMPLING)
    draws = torch.from_numpy(_gaussian(size * width, seed, *name, "pca").reshape(size, width)).to(tokens.device)
    directions = torch.linalg.qr(tokens.mT @ (tokens @ draws)).Q
    for _ in range(_POWER_ITERATIONS):
        directions = torch.linalg.qr(tokens.mT @ (tokens @ directions)).Q
    turned = tokens @ directions
    top = torch.linalg.eigh(turned.mT @ turned).eigenvectors.flip(1)[:, :rank]
    basis: Tensor = (directions @ top).float()
    return basis


def square_ranks(shape: tuple[int, int], numbers: int) -> tuple[int, int]:
    """(k_out, k_in) with `k_out · k_in <= numbers`, as square as the sides O and I allow; at least one each."""
    outputs, inputs = shape
    k_out = max(1, min(outputs, math.isqrt(numbers)))
    k_in = max(1, min(inputs, numbers // k_out))
    return max(1, min(outputs, numbers // k_in)), k_in


def split_rank(shapes: Sequence[tuple[int, int]], total: int) -> list[tuple[int, int]]:
    """Ranks of each parameter so that all of them store at most `total` numbers.

    Every parameter gets an equal share; what small ones cannot use goes to the larger ones.

    Raises:
        ValueError: there are more parameters than numbers.
    """
    if total < len(shapes):
        raise ValueError(
            f"proj_rank_total={total} is less than one number for each of {len(shapes)} parameters; raise it, choose "
            "fewer layers, or keep the second stage (stages=2), which adds all parameters into the same numbers"
        )
    ranks: dict[int, tuple[int, int]] = {}
    left = total
    for done, i in enumerate(sorted(range(len(shapes)), key=lambda i: math.prod(shapes[i]))):
        ranks[i] = square_ranks(shapes[i], left // (len(shapes) - done))
        left -= math.prod(ranks[i])
    return [ranks[i] for i in range(len(shapes))]


def energy_ranks(shapes: Sequence[tuple[int, int]], energies: Sequence[float], numbers: int) -> list[tuple[int, int]]:
    """Ranks that spend `numbers` where the gradients are large: k ∝ energy^(2/3), the same on both sides.

    The variance of an estimated inner product falls as energy²/k in each parameter, its numbers grow as k²; the least
    sum of variances for all numbers has this exponent. Ranks are multiples of 8, between 8 and 512 or the side.

    Args:
        shapes: (O, I) of the gradients.
        energies: mean squared norm of each parameter's gradients.
        numbers: to spend on all of them.
    """
    weights = np.asarray(energies, dtype=np.float64) ** (2 / 3)
    weights = weights / weights.max() if weights.max() > 0 else np.ones(len(shapes))

    def ranks_at(scale: float) -> list[tuple[int, int]]:
        rounded = [8 * max(1, min(_MAX_RANK // 8, round(scale * float(w) / 8))) for w in weights]
        return [(min(k, outputs), min(k, inputs)) for k, (outputs, inputs) in zip(rounded, shapes, strict=True)]

    low, high = 0.0, float(_MAX_RANK) / max(float(weights[weights > 0].min()), 1e-12)
    for _ in range(100):
        middle = (low + high) / 2
        within = sum(k_out * k_in for k_out, k_in in ranks_at(middle)) <= numbers
        low, high = (middle, high) if within else (low, middle)
    return ranks_at(low)


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    q, r = np.linalg.qr(matrix)
    signed: np.ndarray = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)  # the one with positive diagonal is unique
    return signed


def _gaussian(count: int, seed: int, *name: str) -> np.ndarray:
    """Normal deviates by Box and Muller's formula from raw bits, whose stream numpy guarantees (its own deviates may
    change between versions)."""
    pairs = -(-count // 2)
    bits = _random_bits(2 * pairs, seed, *name) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _random_bits(count: int, seed: int, *name: str) -> np.ndarray:
    """`count` random 64-bit words of the stream that belongs to a seed and a name."""
    digest = hashlib.blake2b("\0".join([str(seed), *name]).encode(), digest_size=16).digest()
    bits: np.ndarray = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return bits
