"""Which workers are alive: by process id on this machine, by a heartbeat on others."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_gradtools.core.atomic import write_json_atomically


__all__ = ["Watch", "Worker"]

WORKERS = "workers"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class Worker:
    """This process, as the others that share the folder see it; a context manager, within which it is alive.

    Args:
        folder (`Path`): shared with other workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / WORKERS
        self.about = {
            "id": uuid.uuid4().hex[:12],
            "host": _host(),
            "machine": platform.node(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._beating = self.folder / f"{self.about['id']}.beat"
        self._asking = self.folder / f"{self.about['id']}.asking"
        self._stopped = threading.Event()

    def __enter__(self) -> Worker:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beating.touch()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._beating.unlink(missing_ok=True)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Tells the others that a run without a worker may be about to become this one's."""
        write_json_atomically(self._asking, self.about)
        try:
            yield
        finally:
            self._asking.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with contextlib.suppress(FileNotFoundError):  # it has just stopped
                os.utime(self._beating)


class Watch:
    """What this process knows of other workers.

    Args:
        folder (`Path`): shared with them.
        stale_seconds (`float`, defaults to 60): a worker of another machine whose heartbeat has not moved for so long,
            by this machine's clock, is dead.
    """

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder = folder / WORKERS
        self.stale_seconds = stale_seconds
        self._seen: dict[str, tuple[int | None, float]] = {}

    def is_alive(self, about: dict[str, Any], *, only_here: bool = False) -> bool:
        """Whether a worker may still be at work.

        Args:
            about (`dict`): what [`Worker`] says of itself.
            only_here (`bool`, defaults to `False`): takes workers of other machines for dead.
        """
        if about["host"] == _host():
            return about["started"] is not None and about["started"] == _started(about["pid"])
        if only_here:
            return False
        try:
            beat: int | None = (self.folder / f"{about['id']}.beat").stat().st_mtime_ns
        except FileNotFoundError:
            beat = None  # or not to be seen from here yet
        last, since = self._seen.get(about["id"], (-1, 0.0))
        if beat != last:
            self._seen[about["id"]] = (beat, time.monotonic())
            return True
        return time.monotonic() - since < self.stale_seconds

    def anyone_asking(self, *, only_here: bool = False) -> bool:
        """Whether a live worker is between taking a run and signing it."""
        alive = False
        for path in self.folder.glob("*.asking"):
            with contextlib.suppress(FileNotFoundError):
                if self.is_alive(json.loads(path.read_text()), only_here=only_here):
                    alive = True
                else:
                    path.unlink(missing_ok=True)
        return alive


def _host() -> str:
    """A machine since it was started, and the processes that see each other on it."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    linux = [boot.read_text().strip(), str(processes.stat().st_ino)] if boot.exists() and processes.exists() else []
    return "-".join([platform.node(), *linux])


def _started(pid: int) -> float | None:
    """When a process began, which tells it from a later one with its id; None if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
