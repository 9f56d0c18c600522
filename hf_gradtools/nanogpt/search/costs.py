"""What a configuration costs, in the unit that a search saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


__all__ = ["HARDWARE_COSTS", "MEASURED_COSTS", "TARGETS", "ReportFn", "measured_cost", "reported_cost"]

ReportFn = Callable[[Mapping[str, Any]], Any]
"""From flags to what [`~hf_gradtools.nanogpt.hardware.hardware_report`] returns; nothing is trained."""

# Target -> metric of a run.
MEASURED_COSTS = {"params": "num_params", "vram": "peak_gpu_mb", "iter": "iter_latency_avg"}
# Target -> attribute of the hardware report, for one token at the end of a block.
HARDWARE_COSTS = {"macs": "macs_per_token", "exp": "exps_per_token", "kv_bytes": "state_bytes"}
TARGETS = (*MEASURED_COSTS, *HARDWARE_COSTS)


def measured_cost(target: str, metrics: Mapping[str, float]) -> float:
    """The cost that a run measured.

    Raises:
        ValueError: it did not measure it.
    """
    metric = MEASURED_COSTS[target]
    cost = metrics.get(metric, math.nan)
    if not math.isfinite(cost):
        raise ValueError(
            f"efficiency_target={target!r} needs {metric}, and the runs reported {', '.join(metrics)}. "
            f"Pass one of {', '.join(HARDWARE_COSTS)}, which need no measurement."
        )
    return cost


def reported_cost(target: str, report: Any) -> float:
    """The cost that a hardware report tells."""
    return float(getattr(report, HARDWARE_COSTS[target]))
