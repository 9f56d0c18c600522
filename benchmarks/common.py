"""What the benchmarks share: interleaved timing, exact memory peaks, Markdown tables."""

from __future__ import annotations

import gc
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile


MIB = 2**20


@dataclass
class Variant:
    """One way to do the work that a benchmark compares.

    Args:
        run: does it once.
        installed: context in which `run` works (hooks on the model, say); entered and left outside the clock.
    """

    run: Callable[[], Any]
    installed: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Times:
    """Seconds of each round: CPU time of all threads, and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def ratio(self, baseline: Times, clock: str) -> float:
        """Median over the rounds of the ratio to the baseline of the same round, so that a slow minute of the machine
        weighs on both."""
        pairs = zip(getattr(self, clock), getattr(baseline, clock), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@contextmanager
def stopwatch(times: Times) -> Iterator[None]:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(time.perf_counter() - wall)


def time_interleaved(variants: Mapping[str, Variant], rounds: int) -> dict[str, Times]:
    """Times each variant once per round in one process; every round starts one variant further on."""
    names = list(variants)
    times = {name: Times() for name in names}
    for start in range(rounds):
        for name in names[start % len(names) :] + names[: start % len(names)]:
            with variants[name].installed(), stopwatch(times[name]):
                variants[name].run()
    return times


def peak_bytes(work: Callable[[], Any]) -> int:
    """The largest sum of live tensor bytes while `work` runs, above what was live before it.

    Replays the allocations and frees that torch's profiler records in the CPU allocator. That is exact, and it sees
    what autograd and kernels hold inside C++, which Python-side trackers of storages miss; the process' resident set
    would be blurred by what malloc keeps. Frees of what was live before count for nothing, and the scratch of the
    matrix library, which is not torch's, is not in it. :func:`check_peak_bytes` holds it against a known answer.
    """
    gc.collect()
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record,
    ):
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def check_peak_bytes() -> None:
    """A case with known answer: three matrices at once, and in backward the two saved ones with two gradients.

    Raises:
        AssertionError: the profiler of this torch build does not report what it should.
    """
    n = 512
    matrix = n * n * 4

    def three() -> None:
        a = torch.ones(n, n)
        b = a.exp()
        del a
        c = b.exp()
        del b, c
        torch.ones(n, n).add(1).add_(1)

    def backward() -> None:
        x = torch.ones(n, n, requires_grad=True)
        (x.exp()).sum().backward()  # x, exp(x), and its product with the (expanded, 4 byte) output gradient

    for work, expected in ((three, 2 * matrix), (backward, 3 * matrix)):
        found = peak_bytes(work)
        assert abs(found - expected) < 4096, f"the profiler reports a peak of {found} bytes where it is {expected}"


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes at start, stop and each free of older memory."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> str:
    """The line under a table: command, versions, threads, processor."""
    command = " ".join(["python", *map(shlex.quote, [os.path.relpath(sys.argv[0]), *sys.argv[1:]])])
    return (
        f"`{command}` · torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads on {os.cpu_count()} CPUs ({_processor()})"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
