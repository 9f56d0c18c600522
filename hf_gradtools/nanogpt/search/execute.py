"""One attempt at a run: in a process of its own, or in this one."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.run_queue import LOST, OBJECTIVE, Attempt


__all__ = ["RunFn", "attempt_folder", "die_with_parent", "earlier_folders", "execute"]

RunFn = Callable[[dict[str, Any], Path], Mapping[str, float]]
"""Runs a configuration, writing into the folder it is given; returns at least `best_val_loss`."""

METRICS, ERROR, LOG, EARLIER = "metrics.json", "error.json", "run.log", "earlier.json"
TRACEBACK_LINES, LOG_LINES = 25, 15
MOST_DEATHS = 3
NAME_LENGTH = 80  # of a folder


def attempt_folder(root: Path, run: Run, number: int) -> Path:
    """Where an attempt's files go: no two attempts share a folder, since the first one's process may still write."""
    name = re.sub(r"[^\w.=+-]+", "_", run.name).strip("._")[:NAME_LENGTH]
    return root / "-".join([name, run.key[:8], *([f"retry{number}"] if number else [])])


def execute(
    run: RunFn, attempt: Attempt, root: Path, *, in_process: bool = False, preload: Sequence[str] = ()
) -> tuple[dict[str, Any], Path]:
    """Makes an attempt, or takes up the result of an earlier one whose worker died before it could record it.

    Args:
        run (`RunFn`): must be importable by name if it runs in a process of its own.
        attempt (`Attempt`): what is run.
        root (`Path`): of the folders of all runs.
        in_process (`bool`, defaults to `False`): runs in this process, which a crash would end.
        preload (`Sequence[str]`): modules that a process of its own begins with.

    Returns:
        `tuple[dict, Path]`: `{"metrics": ...}` or `{"error": {"type", "message", "traceback"}}`, and the folder.
    """
    for earlier in attempt.earlier:
        folder = attempt_folder(root, attempt.run, earlier.attempt)
        if (metrics := _recorded(folder, attempt.run)) is not None:
            return {"metrics": metrics}, folder
    folder = attempt_folder(root, attempt.run, attempt.number)
    if sum(earlier.died for earlier in attempt.earlier) >= MOST_DEATHS:
        return {
            "error": _error("WorkerDied", f"{MOST_DEATHS} workers died while they ran it in their own process.")
        }, folder
    folder.mkdir(parents=True, exist_ok=True)
    for record in (METRICS, ERROR, LOG):  # of a journal that was deleted
        (folder / record).unlink(missing_ok=True)
    write_json_atomically(
        folder / EARLIER, [attempt_folder(root, attempt.run, number).name for number in _lost(attempt)]
    )
    flags = attempt.run.flags()
    if in_process:
        return _guarded(run, flags, folder, attempt.run), folder
    return _isolated(run, flags, folder, attempt.run, preload), folder


def earlier_folders(folder: Path) -> list[Path]:
    """The folders of the attempts that ended with their workers since the run last failed, the latest first.

    Args:
        folder (`Path`): that a run is given; it may take up there what they left.
    """
    path = folder / EARLIER
    return [folder.with_name(name) for name in json.loads(path.read_text())] if path.exists() else []


def _lost(attempt: Attempt) -> list[int]:
    lost = itertools.takewhile(lambda earlier: earlier.status == LOST, reversed(attempt.earlier))
    return [earlier.attempt for earlier in lost]


def die_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _guarded(run: RunFn, flags: dict[str, Any], folder: Path, named: Run) -> dict[str, Any]:
    """Runs, and makes of any error a record; SystemExit too, with which argument parsers refuse flags."""
    try:
        metrics = _checked(run(flags, folder))
        write_json_atomically(folder / METRICS, {"key": named.key, "metrics": metrics})
    except (Exception, SystemExit) as error:
        lines = traceback.format_exc().rstrip().splitlines()[-TRACEBACK_LINES:]
        return {"error": _error(type(error).__name__, str(error), "\n".join(lines))}
    return {"metrics": metrics}


def _checked(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """Metrics as plain numbers, with a loss that can be compared."""
    plain = {name: value if isinstance(value, (bool, int)) else float(value) for name, value in metrics.items()}
    if OBJECTIVE not in plain:
        raise KeyError(f"the run returned no {OBJECTIVE!r}, only {', '.join(plain) or 'nothing'}")
    if not math.isfinite(plain[OBJECTIVE]):
        raise FloatingPointError(f"{OBJECTIVE} is {plain[OBJECTIVE]}")
    return plain


def _isolated(run: RunFn, flags: dict[str, Any], folder: Path, named: Run, preload: Sequence[str]) -> dict[str, Any]:
    process = _context([__name__, *preload]).Process(target=_child, args=(run, flags, folder, named))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():  # this worker was interrupted
            process.kill()
            process.join()
    if (metrics := _recorded(folder, named)) is not None:
        return {"metrics": metrics}
    if (folder / ERROR).exists():
        return {"error": json.loads((folder / ERROR).read_text())}
    return {"error": _error("ProcessDied", _ended(process.exitcode), _tail(folder / LOG))}


def _context(preload: list[str]) -> Any:
    """Processes that begin with modules imported, but without the CUDA and the threads of this one."""
    if sys.platform != "linux":  # elsewhere system libraries do not outlive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


def _child(run: RunFn, flags: dict[str, Any], folder: Path, named: Run) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker is told, and ends this process
    with open(folder / LOG, "ab", buffering=0) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    result = _guarded(run, flags, folder, named)
    if "error" in result:
        write_json_atomically(folder / ERROR, result["error"])


def _recorded(folder: Path, named: Run) -> dict[str, float] | None:
    """The metrics that an attempt left, if they are of this configuration."""
    path = folder / METRICS
    if not path.exists():
        return None
    recorded = json.loads(path.read_text())
    return recorded["metrics"] if recorded["key"] == named.key else None


def _error(kind: str, message: str, trace: str = "") -> dict[str, str]:
    return {"type": kind, "message": message, "traceback": trace}


def _ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        hint = " Not enough memory?" if -exitcode == signal.SIGKILL else ""
        return f"the run's process was ended by {signal.Signals(-exitcode).name}.{hint}"
    return f"the run's process ended with exit code {exitcode} and no result."


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-LOG_LINES:])
