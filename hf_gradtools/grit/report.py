"""Ranks and spectra of an adapter, as numbers to log and to keep."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
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
    spectra = [eigenbasis(factors)[0] for _, factors in _by_rank(controller)]  # [M, 2, R] each
    if spectra:
        effective, top = torch.cat([effective_rank(x) for x in spectra]), torch.cat([x[..., 0] for x in spectra])
        for i, letter in enumerate("ag"):
            values[f"effective_rank_{letter}"] = float(effective[:, i].mean())
            values[f"top_eigenvalue_{letter}"] = float(top[:, i].mean())
    return values


def rank_report(controller: GritController) -> dict[str, Any]:
    """Ranks, spectra and parameters of every layer, as they are written when training ends.

    Returns:
        `layers`: by name `rank`, `base_rank`, `parameters`; `k_a` and `k_b`, the least ranks that hold the threshold
        of the spectra of Σ_a and Σ_g; effective ranks, top eigenvalues, and the `balanced` spectrum; then
        `parameters`, `base_parameters`, `reduction` of all.
    """
    report = controller.tuner.rank_report(controller.adapter)
    threshold = controller.config.rank_adaptation_threshold
    for names, factors in _by_rank(controller):
        values = eigenbasis(factors)[0]
        columns = {
            ("k_a", "k_b"): rank_for_energy(values, threshold, 1),
            ("effective_rank_a", "effective_rank_g"): effective_rank(values),
            ("top_eigenvalue_a", "top_eigenvalue_g"): values[..., 0],
        }
        balanced = energies("balanced", *factors.unbind(1)).tolist()
        for i, name in enumerate(names):
            for titles, column in columns.items():
                report["layers"][name] |= dict(zip(titles, column[i].tolist(), strict=True))
            report["layers"][name]["balanced"] = balanced[i]
    return {"steps": controller.step, "threshold": threshold, **report}


def read_report(source: GritController | dict[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """The report of a controller, or one that was kept: itself, or the path of `grit_ranks.json`.

    Raises:
        ValueError: it has no layers.
    """
    if isinstance(source, (str, os.PathLike)):
        report = json.loads(Path(source).read_bytes())
    else:
        report = source if isinstance(source, dict) else rank_report(source)
    if not isinstance(report, dict) or not report.get("layers"):
        raise ValueError("the report has no layers. Pass a controller, rank_report(controller), or grit_ranks.json.")
    return report


def _by_rank(controller: GritController) -> list[tuple[list[str], Tensor]]:
    """Names, and factors `[M, 2, R, R]` on the CPU, of all measured layers of one rank at a time."""
    groups: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for layer, factors in controller.live_factors():
        groups[factors.shape[-1]][layer.name] = factors.cpu()
    return [(list(members), torch.stack(list(members.values()))) for members in groups.values()]
