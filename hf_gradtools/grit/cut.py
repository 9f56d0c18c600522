"""Cutting an adapter to a smaller rank while it trains: matrices, optimizer state and statistics follow together.

Shape letters: R rank, K kept rank, M layers. With `A' = left @ A` and `B' = B @ right` the activations become
`left @ a`, the gradients `rightᵀ @ b`, and so the gradients of the matrices `rightᵀ @ ∇A` and `∇B @ leftᵀ`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_gradtools.core.curvature import eigenbasis, energies, projectors, ranks_for_total_energy, truncation
from hf_gradtools.grit.moments import change_basis, replace_parameter


if TYPE_CHECKING:
    from hf_gradtools.grit.controller import GritController
    from hf_gradtools.grit.layer import SteeredLayer


logger = logging.getLogger(__name__)

ALL_LAYERS = "all layers"  # whose energy the threshold is of


@dataclass(frozen=True)
class Cut:
    """What was done to a layer: its ranks, and the share of its spectrum that went."""

    name: str
    before: int
    after: int
    lost: float


def cut_layers(controller: GritController, rank: int | None) -> list[Cut]:
    """Cuts every layer with enough samples; all layers of one rank are decomposed together.

    Args:
        controller: holds layers, statistics and optimizer.
        rank: the rank that all layers get; None: as the config says.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} must be a whole number of at least 1.")
    if any(layer.adapter in layer.module.merged_adapters for layer in controller.layers):
        raise ValueError(f"adapter {controller.adapter!r} is merged; call unmerge_adapter() before its rank changes.")
    spectra = layer_spectra(controller)
    ranks = plan_ranks(controller, spectra) if rank is None else dict.fromkeys(spectra, rank)
    if rank is None:
        _spend(controller, spectra, ranks)
    cuts = []
    for layer, left, right, kept in _transforms(controller, ranks, in_place=controller.rank_change == "none"):
        before, spectrum = controller.live_ranks[layer.name], spectra[layer.name]
        _apply(controller, layer, left, right, kept)
        cuts.append(Cut(layer.name, before, kept, float(spectrum[kept:].sum() / spectrum.sum())))
    if cuts:
        logger.info("step %d: %d of %d layers cut", controller.step, len(cuts), len(controller.layers))
    return cuts


def layer_spectra(controller: GritController) -> dict[str, Tensor]:
    """The energies `[R]` that decide each layer's rank, on the CPU. Layers that no gradient has reached have none."""
    method, spectra = controller.config.reprojection or "balanced", {}
    for members in _by_rank(controller):
        values = energies(method, *_stack(members)).cpu()
        spectra.update((layer.name, x) for (layer, _), x in zip(members, values, strict=True) if x.sum() > 0)
    return spectra


def plan_ranks(controller: GritController, spectra: dict[str, Tensor]) -> dict[str, int]:
    """The rank that the config wants for each layer now.

    The threshold is of what there was before the first cut, not of what the last one has left.
    """
    config = controller.config
    if not config.enable_rank_adaptation or controller.step < config.rank_adaptation_start_step:
        return dict.fromkeys(spectra, config.reprojection_k)
    ranks: dict[str, int] = {}
    for whose, names in _pools(controller, spectra).items():
        threshold = min(1.0, config.rank_adaptation_threshold / controller.kept_energy.get(whose, 1.0))
        sizes = [_width(controller, name) for name in names]
        chosen = ranks_for_total_energy(_weighted(controller, spectra, names), sizes, threshold, config.least_rank)
        ranks.update(zip(names, chosen, strict=True))
    return ranks


def kept_projectors(controller: GritController) -> dict[str, tuple[Tensor, Tensor]]:
    """Projectors `[R, R]` on what a cut would keep, of each layer that it would cut: `left @ A`, `B @ right`."""
    ranks = plan_ranks(controller, layer_spectra(controller))
    return {layer.name: (left, right) for layer, left, right, _ in _transforms(controller, ranks, in_place=True)}


def _pools(controller: GritController, spectra: dict[str, Tensor]) -> dict[str, list[str]]:
    """Layers that share a threshold, by its name. Spectra of a single factor do not compare between layers."""
    config = controller.config
    if config.rank_allocation == "global" and config.reprojection == "balanced":
        return {ALL_LAYERS: list(spectra)} if spectra else {}
    return {name: [name] for name in spectra}


def _weighted(controller: GritController, spectra: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """Energies are per token; what a cut costs is their sum over the tokens that a layer sees."""
    return [spectra[name] * controller.fishers[name].samples for name in names]


def _width(controller: GritController, name: str) -> int:
    A, B = controller.held[name]  # noqa: N806
    return A.shape[1] + B.shape[0]


def _spend(controller: GritController, spectra: dict[str, Tensor], ranks: dict[str, int]) -> None:
    """Notes how much energy the cut leaves. A projection in place uses nothing up: the next steps fill it again."""
    if controller.rank_change == "none":
        return
    for whose, names in _pools(controller, spectra).items():
        weighted = _weighted(controller, spectra, names)
        held = sum(float(x[: ranks[name]].sum()) for x, name in zip(weighted, names, strict=True))
        share = held / sum(float(x.sum()) for x in weighted)
        controller.kept_energy[whose] = controller.kept_energy.get(whose, 1.0) * share


def _by_rank(controller: GritController) -> list[list[tuple[SteeredLayer, Tensor]]]:
    groups: dict[tuple[int, torch.device], list[tuple[SteeredLayer, Tensor]]] = {}
    for layer, factors in controller.live_factors():
        groups.setdefault((factors.shape[-1], factors.device), []).append((layer, factors))
    return list(groups.values())


def _stack(members: list[tuple[SteeredLayer, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ_a and Σ_g of all members, `[M, R, R]` each."""
    activation, gradient = torch.stack([factors for _, factors in members]).unbind(1)
    return activation, gradient


def _transforms(
    controller: GritController, ranks: dict[str, int], in_place: bool
) -> list[tuple[SteeredLayer, Tensor, Tensor, int]]:
    """`left` and `right` of every layer whose rank falls, and the rank."""
    method, result = controller.config.reprojection or "balanced", []
    for members in _by_rank(controller):
        rank = members[0][1].shape[-1]
        wanted = {ranks.get(layer.name, rank) for layer, _ in members}
        for kept in sorted(k for k in wanted if k < rank):
            chosen = [(layer, factors) for layer, factors in members if ranks.get(layer.name, rank) == kept]
            make = projectors if in_place else truncation
            lefts, rights = make(method, *_stack(chosen), kept)
            result += [(layer, *pair, kept) for (layer, _), *pair in zip(chosen, lefts, rights, strict=True)]
    return result


def _apply(controller: GritController, layer: SteeredLayer, left: Tensor, right: Tensor, rank: int) -> None:
    """Moves one layer into the new coordinates; `left` `[K, live]`, `right` `[live, K]`."""
    fisher, live = controller.fishers[layer.name], controller.live_ranks[layer.name]
    A, B = layer.A.detach().double(), layer.B.detach().double()  # noqa: N806
    if controller.rank_change == "none":  # as in the paper's code: directions are emptied, the optimizer is not told
        replace_matrices(controller, layer, left @ A, B @ right)
        fisher.transform(left, right.mT)
        return
    left, right = _at_scale_of(A[:live], left, right)
    # Coordinates that were masked before, or are masked now: zeros in both matrices have zero gradients, and stay.
    masked = layer.rank - rank if controller.rank_change == "masked" else 0
    left = pad(left, (0, layer.rank - live, 0, masked))
    right = pad(right, (0, masked, 0, layer.rank - live))
    replace_matrices(controller, layer, left @ A, B @ right)
    controller.live_ranks[layer.name] = rank
    fisher.transform(left, right.mT)
    _carry_moments(controller, layer, left, right, fisher.factors[:, :rank, :rank])


def _at_scale_of(A: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Scales the new coordinates so that the rows of `left @ A` are as long as those of A on average: the
    learning rate means what it did."""
    wanted = A.square().sum(1).mean().sqrt()
    scale = wanted / (left @ A).norm(dim=1).clamp_min(1e-12 * wanted + 1e-300)
    return scale[:, None] * left, right / scale


def replace_matrices(controller: GritController, layer: SteeredLayer, A: Tensor, B: Tensor) -> None:  # noqa: N803
    """Writes into the parameters, or puts smaller ones in their place, which the optimizer goes on with."""
    if A.shape == layer.A.shape:
        layer.A.copy_(A)
        layer.B.copy_(B)
        return
    old = layer.A, layer.B
    for before, after in zip(old, controller.tuner.resize(layer, A, B), strict=True):
        replace_parameter(controller.optimizer, before, after)
    controller.held[layer.name] = layer.A, layer.B


def _carry_moments(
    controller: GritController, layer: SteeredLayer, left: Tensor, right: Tensor, factors: Tensor
) -> None:
    """From the old eigenbases, in which the optimizer works under rank-SOAP, to those of the new factors."""
    for_down, for_up = right.mT, left  # ∇A' = for_down @ ∇A, ∇B' = ∇B @ for_upᵀ
    old = controller.bases.pop(layer.name, None)  # inverses would be of the old coordinates
    if old is not None and controller.config.preconditioner == "rank_soap":
        old = old.to(left)
        new = torch.eye(layer.rank, dtype=left.dtype, device=left.device).repeat(2, 1, 1)
        live = factors.shape[-1]
        new[:, :live, :live] = eigenbasis(factors)[1]
        for_up, for_down = new[0].mT @ for_up @ old[0], new[1].mT @ for_down @ old[1]
        controller.bases[layer.name] = new
    change_basis(controller.optimizer, layer.A, lambda m: for_down @ m, lambda v: for_down.square() @ v)
    change_basis(controller.optimizer, layer.B, lambda m: m @ for_up.mT, lambda v: v @ for_up.square().mT)
