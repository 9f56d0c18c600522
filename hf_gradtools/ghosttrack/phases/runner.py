"""The phases one after the other, as one command runs them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_gradtools.ghosttrack.phases.sbatch import PHASES


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.phases.common import Layers, PhaseSummary
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


__all__ = ["FUNCTIONS", "run_phase", "run_pipeline"]

logger = logging.getLogger(__name__)

FUNCTIONS = {
    "extract": "extract_hidden_states",
    "train": "train_saes",
    "track": "track_hypotheses",
    "detect": "fit_detectors",
    "evaluate": "evaluate_detectors",
}


def run_phase(phase: str, config: GhostTrackConfig, layers: Layers = None, force: bool = False) -> PhaseSummary:
    """Runs one phase: it goes on where it was killed, and is skipped where it is finished.

    Args:
        phase (`str`): `"extract"`, `"train"`, `"track"`, `"detect"` or `"evaluate"`.
        config ([`GhostTrackConfig`]): of the run.
        layers (*optional*): `"0-3"`, a number or numbers; by default `extraction.layers`.
        force (`bool`, defaults to `False`): make anew what is there.

    Raises:
        ValueError: there is no such phase, or the phase says what it lacks.
    """
    if phase not in FUNCTIONS:
        raise ValueError(f"phase={phase!r} is unknown. Pass one of {', '.join(PHASES)}.")
    function: Any = getattr(import_module(f"hf_gradtools.ghosttrack.phases.{phase}"), FUNCTIONS[phase])
    summary: PhaseSummary = function(config, layers, force)
    return summary


def run_pipeline(
    config: GhostTrackConfig,
    layers: Layers = None,
    force: bool = False,
    phases: Sequence[str] = PHASES,
    on_summary: Callable[[PhaseSummary], object] = logger.info,
) -> list[PhaseSummary]:
    """Runs all phases on this machine; run again, it goes on where it was killed.

    All layers share one pass of the model in extraction and one pass over the hidden states in training: on one
    device that is what layers in parallel amount to. Where memory runs out, batches are halved, or fewer layers learn
    at a time. To use several devices, start the phases with `--layers` of their own, as the script of `sbatch` does.

    Args:
        config ([`GhostTrackConfig`]): of the run.
        layers (*optional*): see [`run_phase`].
        force (`bool`, defaults to `False`): make anew what is there.
        phases (`Sequence[str]`): some of them, in their order.
        on_summary (`Callable`): called after each phase.

    Returns:
        `list[PhaseSummary]`: of each phase.
    """
    from hf_gradtools.ghosttrack.phases.track import load_rows_of

    if set(phases) & {"track", "detect", "evaluate"}:
        for name in config.datasets:  # what is wrong with them is said before hours of training
            load_rows_of(config, name)
    summaries = []
    for phase in phases:
        summaries.append(run_phase(phase, config, layers, force))
        on_summary(summaries[-1])
    return summaries
