"""How gradients are scaled before they are compared: none, unit length, or the inverse Fisher matrix.

Shape letters: Q queries, N rows of a store, n of a block, d numbers in a gradient. The Fisher matrix is that of the
stored rows, F = 1/N sum_i p_i p_i^T (TRAK, arXiv 2303.14186; LoGra, arXiv 2405.13954), damped by a share of its mean
eigenvalue; unit length in its inverse's norm is RelatIF's (arXiv 2003.11630).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def fisher_matrix(blocks: Iterable[tuple[int, Tensor]], dim: int) -> Tensor:
    """F = 1/N sum_i p_i p_i^T, summed in float64 over products of blocks in float32.

    Args:
        blocks: (first row, `[n, d]`).
        dim: d.

    Returns:
        `[d, d]` float64. Costs 2 N d^2 FLOPs.
    """
    total, rows = torch.zeros(dim, dim, dtype=torch.float64), 0
    for _, block in blocks:
        total += block.T @ block
        rows += len(block)
    return total / max(rows, 1)


def damped_cholesky(fisher: Tensor, damping: float) -> Tensor:
    """L with L L^T = F + damping * mean eigenvalue * I.

    Raises:
        ValueError: `damping` is negative, or so small that the matrix is singular, or all gradients are zero.
    """
    if not damping >= 0:
        raise ValueError(f"damping={damping}; pass a share of the Fisher matrix's mean eigenvalue, such as 0.1.")
    mean = fisher.diagonal().mean()
    if mean == 0:
        raise ValueError("all gradients of the store are zero, so precondition='fisher' has no meaning. Pass None.")
    factor, failed = torch.linalg.cholesky_ex(fisher + damping * mean * torch.eye(len(fisher), dtype=fisher.dtype))
    if failed or factor.diagonal().min() < 1e-7 * factor.diagonal().max():
        raise ValueError(f"the Fisher matrix is singular at damping={damping}. Pass a larger one, such as 0.1.")
    return factor


@dataclass
class Scorer:
    """Scores rows against queries: a matrix product, and the rows' scale.

    Attributes:
        weights: `[d, Q]` float32.
        row_scale: `[n, d]` -> `[n]`, or `None` for 1.
    """

    weights: Tensor
    row_scale: Callable[[Tensor], Tensor] | None = None

    def __call__(self, block: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, d]` -> `[n, Q]`, written to `out` if there is one."""
        scores = torch.mm(block, self.weights, out=out)
        return scores if self.row_scale is None else scores.mul_(self.row_scale(block)[:, None])


def dot_scorer(queries: Tensor, factor: Tensor | None = None) -> Scorer:
    """q^T p, or q^T (L L^T)^-1 p.

    Args:
        queries: `[Q, d]`.
        factor: L `[d, d]`.
    """
    weights = queries.double().T
    if factor is not None:
        weights = torch.cholesky_solve(weights, factor)
    return Scorer(weights.float().contiguous())


def cosine_scorer(queries: Tensor, factor: Tensor | None = None) -> Scorer:
    """The cosine of query and row, in the metric of (L L^T)^-1 where L is given. Of a zero gradient it is 0."""
    if factor is None:
        columns = queries.double().T
        return Scorer((columns * _inverse(columns.norm(dim=0))).float().contiguous(), _inverse_norms)
    whitening = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    whitened = whitening @ queries.double().T
    weights = whitening.T @ (whitened * _inverse(whitened.norm(dim=0)))
    to_white = whitening.T.float().contiguous()
    return Scorer(weights.float().contiguous(), lambda block: _inverse_norms(block @ to_white))


def _inverse_norms(block: Tensor) -> Tensor:
    return _inverse(torch.linalg.vector_norm(block, dim=1))


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, 0)
