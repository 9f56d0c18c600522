"""Eigenbases, or inverses, of every layer's factors, and an optimizer's way from one basis to the next.

Shape letters: M layers, R rank, K coordinates in use (the rest is masked).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_gradtools.core.curvature import damped_inverse, eigenbasis, inverse_power
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.layer import SteeredLayer
from hf_gradtools.grit.moments import change_basis
from hf_gradtools.grit.preconditioner import Preconditioner, Turn


def decompose(
    config: GritConfig,
    measured: Sequence[tuple[SteeredLayer, Tensor]],
    live_ranks: Mapping[str, int],
    damping: float,
) -> dict[str, Tensor]:
    """What the config's preconditioner multiplies with, computed for all layers of one rank together.

    Returns:
        by layer `[2, R, R]`, of the activations' factor and of the gradients': for rank-SOAP eigenvectors in columns,
        else damped inverses. Masked coordinates are left alone.

    Raises:
        torch.linalg.LinAlgError: a factor is not finite, or not positive definite.
    """
    groups: dict[tuple[int, int, str], list[tuple[SteeredLayer, Tensor]]] = defaultdict(list)
    for layer, factors in measured:
        device = config.kfac_inversion_device or factors.device
        groups[live_ranks[layer.name], layer.rank, str(device)].append((layer, factors))
    result: dict[str, Tensor] = {}
    for (live, rank, device), members in groups.items():
        factors = torch.stack([f[:, :live, :live] for _, f in members]).to(device)
        if config.preconditioner == "rank_soap":
            matrices = eigenbasis(factors)[1]
        elif config.kfac_exponent == 1:
            matrices = damped_inverse(factors, damping)[0]
        else:
            matrices = inverse_power(factors, damping, config.kfac_exponent)
        whole = torch.eye(rank, dtype=matrices.dtype, device=matrices.device).repeat(len(members), 2, 1, 1)
        whole[..., :live, :live] = matrices
        for (layer, _), both in zip(members, whole, strict=True):
            result[layer.name] = both.to(layer.A.device)
    return result


def rebase(optimizer: torch.optim.Optimizer, layer: SteeredLayer, old: Tensor | None, new: Tensor | None) -> None:
    """Carries the optimizer's moments from a layer's old eigenbases `[2, R, R]` into new ones; None: no rotation."""
    identity = torch.eye(layer.rank, dtype=torch.float64, device=layer.A.device).expand(2, -1, -1)
    for_up, for_down = (identity if new is None else new).mT @ (identity if old is None else old)
    # B works in the activations' basis, A in the gradients'.
    change_basis(optimizer, layer.A, lambda m: for_down @ m, lambda v: for_down.square() @ v)
    change_basis(optimizer, layer.B, lambda m: m @ for_up.mT, lambda v: v @ for_up.square().mT)


def build_preconditioner(
    config: GritConfig, layers: Sequence[SteeredLayer], bases: Mapping[str, Tensor]
) -> Preconditioner | None:
    """Puts each layer's matrices at the sides where the config's preconditioner wants them; None without any."""
    turns = []
    for layer in layers:
        if layer.name in bases:
            activation, gradient = bases[layer.name]
            if config.preconditioner == "grit":  # the paper's pairing
                activation, gradient = gradient, activation
            turns += [Turn(layer.A, gradient, is_up=False), Turn(layer.B, activation, is_up=True)]
    rotates = config.preconditioner == "rank_soap"
    return Preconditioner(turns, rotates, config.grafting) if turns else None
