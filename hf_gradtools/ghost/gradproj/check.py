"""Two checks on a first batch: is all of the gradient in the projections, and is each row's its own?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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

OnUncovered = Literal["error", "warn", "ignore"]

_TOLERANCE = 1e-3
_HALF_PRECISION_SLACK = 30  # autograd rounds half-precision weight gradients, projections are summed in float32
_ROW_SLACK = 100  # half-precision activations themselves differ with the shapes of a batch


def batch_to_check(runs: GradientPass, make: Callable[[Sequence[int]], dict[str, Any]], rows: int) -> dict[str, Any]:
    """A batch of two rows (or one) with labels that count, if there is such a one among a few tried."""
    best, most = dict[str, Any](), -1
    for place in range(4):
        batch = make(sorted({rows * place // 8, rows * (place + 4) // 8}))
        counts = runs.target_counts(batch) > 0
        if int(counts.sum()) > most:
            best, most = batch, int(counts.sum())
        if bool(counts.all()):
            break
    return best


def check_coverage(
    runs: GradientPass, projection: Projection, batch: dict[str, Any], on_uncovered: OnUncovered
) -> None:
    """Holds the sum of a batch's projections against the gradient that autograd forms.

    A use of a weight that no layer sees (outside its module's forward) shows as a gap.

    Raises:
        UncoveredGradientError: there is one and `on_uncovered="error"`.
    """
    if runs.target_counts(batch).sum() == 0:
        return
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
    module = missing[0].rsplit(".", 1)[0]
    _complain(
        f"the gradient of {listed} is not all in the projections (off by {max(gaps.values()):.1e}): these parameters "
        "are used outside their module's forward, or shared with a module that is. Leave their layers out by "
        f"layers=[...] (a regular expression can: r'^(?!{module}$)'), register a rule with "
        "hf_gradtools.core.layers.register_rule, or pass on_uncovered='warn'.",
        on_uncovered,
    )


def check_rows(runs: GradientPass, projection: Projection, batch: dict[str, Any], on_uncovered: OnUncovered) -> None:
    """Holds the rows of a batch against the same rows alone.

    They differ where the model weighs rows in its loss in a way that was not foreseen, or mixes them.

    Raises:
        UncoveredGradientError: they do and `on_uncovered="error"`.
    """
    layout = infer_layout((), batch)
    if layout.rows < 2 or layout.segments is not None:
        return
    collector = ProjectionCollector(runs.layers, projection)
    with runs.observed(collector):
        together, counts = runs.project(collector, batch)
        alone = torch.cat([runs.project(collector, _row(batch, n, layout.rows))[0] for n in range(layout.rows)])
    tolerance = _TOLERANCE * (_ROW_SLACK if collector.half_precision else 1)
    gap = float(((together - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(1e-30)).max())
    if all(counts) and gap > tolerance:
        is_half = next(iter(runs.layers[0].parameters.values())).dtype == torch.float16
        underflow = " Or gradients underflow in float16: try bfloat16 or float32 weights." * is_half
        _complain(
            f"rows of a batch have other gradients than alone (off by {gap:.1e}): the loss of "
            f"{type(runs.model).__name__} is no plain mean over the labels, or the model mixes the rows. Pass "
            "batch_size=1, a loss_fn= that is the mean over the labels that are not -100, or on_uncovered='warn'."
            f"{underflow}",
            on_uncovered,
        )


def _row(batch: dict[str, Any], n: int, rows: int) -> dict[str, Any]:
    def of_row(value: Any) -> Any:
        return value[n : n + 1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

    return {name: of_row(value) for name, value in batch.items()}


def _complain(message: str, on_uncovered: OnUncovered) -> None:
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
