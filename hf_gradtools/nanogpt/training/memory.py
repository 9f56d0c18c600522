"""The most memory that a run took."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


__all__ = ["peak_memory_mb", "reset_peak_memory"]

MB = 2**20
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Begins to measure anew, where the system can."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Peak since then, in MiB: of tensors on an accelerator, or of the whole process (its resident set)."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / MB
    if STATUS.exists() and (line := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(line[1]) / 1024
    import resource  # not on Windows
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024
