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


def gpus(flags, folder):
    """Notes the GPUs that it sees, and waits for a second run that does."""
    note(folder, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    deadline = time.monotonic() + 30
    while len(notes(folder.parent.parent)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return {"best_val_loss": 1.0}


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


def surface(flags, folder):
    """A loss that wider and deeper models lower, less and less; some sizes cannot be built."""
    note(folder, f"start {folder.name}")
    time.sleep(flags.get("seconds", 0))
    if flags["n_head"] < 1 or flags["n_embd"] % flags["n_head"]:
        raise ValueError(f"n_head={flags['n_head']} does not divide n_embd={flags['n_embd']}")
    seed = (flags["seed"] * 7919 % 13 - 6) / 6
    mlp = sum(flags["mlp_size"])
    loss = 1 + 8 / flags["n_embd"] + 3 / flags["n_layer"] + 40 / mlp + 50 * (flags["lr"] - 0.003) ** 2
    loss += 0.02 * flags["n_head"] + 20 / flags.get("max_iters", 1000) + flags.get("noise", 0) * seed
    params = flags["n_layer"] * 4 * flags["n_embd"] ** 2 + 2 * flags["n_embd"] * mlp
    note(folder, f"end {folder.name}")
    return {"best_val_loss": loss, "num_params": params, "iter_latency_avg": params / 1e4, "best_val_iter": 9}
