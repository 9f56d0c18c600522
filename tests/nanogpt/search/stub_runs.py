"""Runs that train nothing: importable by name, so that they can run in processes of their own."""

import os
import signal
import sys
import time
from pathlib import Path


def note(folder: Path, text: str) -> None:
    """Adds a line to the file beside the runs' folders, whole even if several processes write."""
    file = os.open(folder.parent.parent / "notes.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def notes(folder: Path) -> list[str]:
    path = folder / "notes.txt"
    return path.read_text().splitlines() if path.exists() else []


def stub(flags, folder):
    """Loss = x; notes when it starts and when it ends."""
    note(folder, f"start {flags['x']}")
    time.sleep(flags.get("seconds", 0))
    note(folder, f"end {flags['x']}")
    return {"best_val_loss": flags["x"], "num_params": 10 * flags["x"]}


def troubled(flags, folder):
    """Ends in the way that `trouble` names."""
    print("about to", flags["trouble"])
    note(folder, flags["trouble"])
    if flags["trouble"] == "raise":
        raise ValueError("n_head=3 does not divide n_embd=64")
    if flags["trouble"] == "kill":
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if flags["trouble"] == "exit":
        sys.exit("unknown flag --n_hed")
    if flags["trouble"] == "nan":
        return {"best_val_loss": float("nan")}
    if flags["trouble"] == "nothing":
        return {}
    return {"best_val_loss": 1.0}
