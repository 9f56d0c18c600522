"""Is all of the gradient in the projections? Autograd's own gradient of a batch, projected, must be their sum."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from ...core import linear
from ...core.projection import Projection, project_matrix
from ..coverage import UncoveredGradientError
from ..layout import infer_layout
from .collector import ProjectionCollector
from .passes import GradientPass


logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3
_HALF_PRECISION_SLACK = 30  # autograd rounds half-precision weight gradients, projections are summed in float32


def check_coverage(
    runs: GradientPass, projection: Projection, batch: dict[str, Any], on_uncovered: Literal["error", "warn", "ignore"]
) -> None:
    """Runs a batch with and without forming weight gradients, and compares.

    A use of a weight that no layer sees (outside its module's forward) shows as a gap.

    Raises:
        UncoveredGradientError: there is one and `on_uncovered="error"`.
    """
    collector = ProjectionCollector(runs.layers, projection)
    collector.block_sums = {}
    with runs.observed(collector, frozen=False):
        collector.begin(infer_layout((), batch), runs.device, runs.dtype)
        grads = torch.autograd.grad(runs.loss(batch), list(collector.names), allow_unused=True)
        collector.take()
    gaps = _gaps(collector, projection, dict(zip(collector.names.values(), grads, strict=True)))
    missing = [name for name, gap in gaps.items() if gap]
    if not missing:
        return
    listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    message = (
        f"the gradient of {listed} is not all in the projections (off by {max(gaps.values()):.1e}): these parameters "
        "are used outside their module's forward. Leave their layers out by layers=[...], register a rule with "
        "hf_gradtools.core.layers.register_rule, or pass on_uncovered='warn'."
    )
    if on_uncovered == "error":
        raise UncoveredGradientError(message)
    logger.warning(message)


def _gaps(collector: ProjectionCollector, projection: Projection, grads: dict[str, Tensor | None]) -> dict[str, float]:
    """For every block the relative difference, zero where it is rounding."""
    assert collector.block_sums is not None
    pairs = {}
    for layer in collector.layers:
        for name, p in layer.parameters.items():
            block = collector.names[p]
            grad = grads[block]
            grad = torch.zeros_like(p) if grad is None else grad
            wide = layer.rule.as_matrix(name, grad).to(linear.accumulation_dtype(grad.dtype))
            theirs = project_matrix(wide, projection.bases[block])
            pairs[block] = (collector.block_sums.get(block, torch.zeros_like(theirs)), theirs)
    total = max(float(theirs.norm()) for _, theirs in pairs.values())
    tolerance = _TOLERANCE * (_HALF_PRECISION_SLACK if collector.half_precision else 1)
    gaps = {}
    for block, (mine, theirs) in pairs.items():
        gap, size = float((mine - theirs).norm()), max(float(mine.norm()), float(theirs.norm()))
        gaps[block] = gap / size if gap > tolerance * size and gap > 1e-2 * tolerance * total else 0.0
    return gaps
