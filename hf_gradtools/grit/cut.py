"""Cutting an adapter to a smaller rank while it trains: matrices, optimizer state and statistics follow together.

Shape letters: R rank, K kept rank. With `A' = left @ A` and `B' = B @ right` the activations become `left @ a`, the
gradients `rightᵀ @ b`, and so the gradients of the matrices `rightᵀ @ ∇A` and `∇B @ leftᵀ`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_gradtools.core.curvature import (
    eigenbasis,
    energies,
    projectors,
    ranks_for_total_energy,
    truncation,
)
from hf_gradtools.grit.moments import change_basis, replace_parameter


if TYPE_CHECKING:
    from hf_gradtools.grit.controller import GritController
    from hf_gradtools.grit.layer import SteeredLayer


logger = logging.getLogger(__name__)


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
    method = controller.config.reprojection or "balanced"
    groups = _by_rank(controller)
    spectra = {
        layer.name: spectrum
        for members in groups
        for (layer, _), spectrum in zip(members, energies(method, *_stack(members)).cpu(), strict=True)
    }
    ranks = _choose_ranks(controller, spectra) if rank is None else dict.fromkeys(spectra, rank)
    cuts = [cut for members in groups for cut in _cut_group(controller, method, members, spectra, ranks)]
    if cuts:
        logger.info("step %d: %d of %d layers cut", controller.step, len(cuts), len(controller.layers))
    return cuts


def _by_rank(controller: GritController) -> list[list[tuple[SteeredLayer, Tensor]]]:
    groups: dict[tuple[int, torch.device], list[tuple[SteeredLayer, Tensor]]] = {}
    for layer, factors in controller.measured_layers():
        live = controller.live_ranks[layer.name]
        groups.setdefault((live, factors.device), []).append((layer, factors[:, :live, :live]))
    return list(groups.values())


def _stack(members: list[tuple[SteeredLayer, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ_a and Σ_g of all members, `[M, R, R]` each."""
    activation, gradient = torch.stack([factors for _, factors in members]).unbind(1)
    return activation, gradient


def _choose_ranks(controller: GritController, spectra: dict[str, Tensor]) -> dict[str, int]:
    config = controller.config
    if not spectra or not config.enable_rank_adaptation or controller.step < config.rank_adaptation_start_step:
        return dict.fromkeys(spectra, config.reprojection_k)
    if config.rank_allocation == "layer":
        return {name: _spend(controller, name, [x], [1])[0] for name, x in spectra.items()}
    sizes = {layer.name: layer.A.shape[1] + layer.B.shape[0] for layer in controller.layers}
    chosen = _spend(controller, "all layers", list(spectra.values()), [sizes[name] for name in spectra])
    return dict(zip(spectra, chosen, strict=True))


def _spend(controller: GritController, whose: str, spectra: list[Tensor], sizes: list[int]) -> list[int]:
    """Ranks that keep the threshold of what there was before the first cut, not of what the last one has left.

    A projection in place (`rank_change="none"`) does not use anything up: the next steps fill it again.
    """
    config, kept = controller.config, controller.kept_energy.get(whose, 1.0)
    threshold = min(1.0, config.rank_adaptation_threshold / kept)
    ranks = ranks_for_total_energy(spectra, sizes, threshold, config.min_lora_rank)
    total = sum(float(x.sum()) for x in spectra)
    if total and controller.rank_change != "none":
        held = sum(float(x[:rank].sum()) for x, rank in zip(spectra, ranks, strict=True))
        controller.kept_energy[whose] = kept * held / total
    return ranks


def _cut_group(
    controller: GritController,
    method: str,
    members: list[tuple[SteeredLayer, Tensor]],
    spectra: dict[str, Tensor],
    ranks: dict[str, int],
) -> list[Cut]:
    cuts, rank = [], members[0][1].shape[-1]
    make = projectors if controller.rank_change == "none" else truncation
    for kept in sorted({ranks[layer.name] for layer, _ in members if ranks[layer.name] < rank}):
        chosen = [(layer, factors) for layer, factors in members if ranks[layer.name] == kept]
        transforms = make(method, *_stack(chosen), kept)
        for (layer, _), left, right in zip(chosen, *transforms, strict=True):
            _apply(controller, layer, left, right, kept)
            spectrum = spectra[layer.name]
            lost = float(spectrum[kept:].sum() / spectrum.sum().clamp_min(1e-300))
            cuts.append(Cut(layer.name, rank, kept, lost))
    return cuts


def _apply(controller: GritController, layer: SteeredLayer, left: Tensor, right: Tensor, rank: int) -> None:
    """Moves one layer into the new coordinates."""
    mode, live = controller.rank_change, controller.live_ranks[layer.name]
    old_a, old_b = layer.A.detach().double()[:live], layer.B.detach().double()[:, :live]
    if mode != "none":
        left, right = _at_scale_of(old_a, left, right)
    if layer.rank > left.shape[1]:  # coordinates masked before
        left, right = pad(left, (0, layer.rank - live)), pad(right, (0, 0, 0, layer.rank - live))
    if mode == "masked":  # zeros in both matrices have zero gradients, so they stay
        left, right = pad(left, (0, 0, 0, layer.rank - rank)), pad(right, (0, layer.rank - rank))
    old_a, old_b = layer.A.detach().double(), layer.B.detach().double()
    _move(controller, layer, left @ old_a, old_b @ right)
    if mode == "none":  # as in the paper's code: directions are emptied, the optimizer is not told
        controller.fishers[layer.name].transform(left, right.mT)
        return
    controller.live_ranks[layer.name] = rank
    fisher = controller.fishers[layer.name]
    fisher.transform(left, right.mT)
    _carry_moments(controller, layer, left, right, fisher.factors[:, :rank, :rank])


def _at_scale_of(A: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Scales the new coordinates so that the rows of `left @ A` are as long as those of A on average: the
    learning rate means what it did."""
    wanted = A.square().sum(1).mean().sqrt()
    scale = wanted / (left @ A).norm(dim=1).clamp_min(1e-12 * wanted + 1e-300)
    return scale[:, None] * left, right / scale


def _move(controller: GritController, layer: SteeredLayer, A: Tensor, B: Tensor) -> None:  # noqa: N803
    if A.shape == layer.A.shape:
        layer.A.copy_(A)
        layer.B.copy_(B)
        return
    old = layer.A, layer.B
    for before, after in zip(old, controller.tuner.resize(layer, A, B), strict=True):
        replace_parameter(controller.optimizer, before, after)


def _carry_moments(
    controller: GritController, layer: SteeredLayer, left: Tensor, right: Tensor, factors: Tensor
) -> None:
    """From the old eigenbases, in which the optimizer works under rank-SOAP, to those of the new factors."""
    for_down, for_up = right.mT, left  # ∇A' = for_down @ ∇A, ∇B' = ∇B @ for_upᵀ
    old = controller.bases.get(layer.name)
    if old is not None and controller.config.preconditioner == "rank_soap":
        old = old.to(left)
        new = torch.eye(layer.rank, dtype=left.dtype, device=left.device).repeat(2, 1, 1)
        live = factors.shape[-1]
        new[:, :live, :live] = eigenbasis(factors)[1]
        for_up, for_down = new[0].mT @ for_up @ old[0], new[1].mT @ for_down @ old[1]
        controller.bases[layer.name] = new
    else:
        controller.bases.pop(layer.name, None)  # inverses are of the old coordinates; the next refresh makes new ones
    change_basis(controller.optimizer, layer.A, lambda m: for_down @ m, lambda v: for_down.square() @ v)
    change_basis(controller.optimizer, layer.B, lambda m: m @ for_up.mT, lambda v: v @ for_up.square().mT)
