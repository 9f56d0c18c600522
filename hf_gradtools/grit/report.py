"""Ranks and spectra of an adapter, as numbers to log and to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_gradtools.core.curvature import effective_rank, eigenbasis, energies, rank_for_energy


if TYPE_CHECKING:
    from torch import Tensor

    from hf_gradtools.grit.controller import GritController


def figures(controller: GritController) -> dict[str, float]:
    """What to log during training: sizes, and means over layers."""
    size = sum(controller.live_ranks[x.name] * (x.A.shape[1] + x.B.shape[0]) for x in controller.layers)
    base = controller.tuner.rank_report(controller.adapter)["base_parameters"]
    values = dict(controller.figures)
    values |= {
        "rank": sum(controller.live_ranks.values()) / len(controller.layers),
        "parameters": float(size),
        "reduction": 1 - size / base,
        "skipped_sums": float(controller.skipped_sums),
        "failed_inversions": float(controller.failed_inversions),
    }
    rows = [_spectra(controller, name, factors) for name, factors in _factors(controller).items()]
    for name in ("effective_rank_a", "effective_rank_g", "top_eigenvalue_a", "top_eigenvalue_g"):
        if rows:
            values[name] = sum(row[name] for row in rows) / len(rows)
    return values


def rank_report(controller: GritController) -> dict[str, Any]:
    """Ranks, spectra and parameters of every layer, as they are written when training ends.

    Returns:
        `layers`: by name `rank`, `base_rank`, `parameters`; `k_a` and `k_b`, the least ranks that hold the threshold
        of the spectra of Σ_a and Σ_g; effective ranks, top eigenvalues, and the `balanced` spectrum; then
        `parameters`, `base_parameters`, `reduction` of all.
    """
    report = controller.tuner.rank_report(controller.adapter)
    for name, factors in _factors(controller).items():
        report["layers"][name] |= _spectra(controller, name, factors)
    return {"steps": controller.step, "threshold": controller.config.rank_adaptation_threshold, **report}


def _factors(controller: GritController) -> dict[str, Tensor]:
    """Of the coordinates in use, by layer."""
    return {
        layer.name: factors[:, :live, :live].cpu()
        for layer, factors in controller.measured_layers()
        for live in [controller.live_ranks[layer.name]]
    }


@torch.no_grad()
def _spectra(controller: GritController, name: str, factors: Tensor) -> dict[str, Any]:
    values, _ = eigenbasis(factors)
    k_a, k_b = rank_for_energy(values, controller.config.rank_adaptation_threshold, 1).tolist()
    effective_a, effective_g = effective_rank(values).tolist()
    return {
        "k_a": k_a,
        "k_b": k_b,
        "effective_rank_a": effective_a,
        "effective_rank_g": effective_g,
        "top_eigenvalue_a": float(values[0, 0]),
        "top_eigenvalue_g": float(values[1, 0]),
        "balanced": energies("balanced", *factors).tolist(),
    }
