"""Checkpoints that are there whole or not at all, so that a run may be killed at any moment.

out_dir/
  config.json  model.safetensors  tokenizer.json  README.md …   the best model so far
  checkpoint-750/   the best evaluation, and what a run needs to go on from there
  checkpoint-1000/  the last one, likewise
  run.json          the options
  training.json     the figures of the run
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from hf_gradtools.core.atomic import atomic_write


__all__ = [
    "checkpoint_folder",
    "checkpoint_iteration",
    "last_checkpoint",
    "list_checkpoints",
    "prune",
    "publish",
    "write_folder",
]

NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED = ".unfinished"
# What only a run that goes on needs.
RUN_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state.*)\.(pt|pth)|trainer_state\.json")


def checkpoint_folder(out_dir: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return out_dir / f"checkpoint-{iteration}"


def checkpoint_iteration(checkpoint: Path) -> int:
    """The iteration of a checkpoint."""
    return int(checkpoint.name.split("-")[1])


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, the earliest first."""
    found = {int(match[1]): path for path in out_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return [found[iteration] for iteration in sorted(found)]


def last_checkpoint(out_dir: Path) -> Path | None:
    """The checkpoint that a run goes on from, if there is one."""
    checkpoints = list_checkpoints(out_dir)
    return checkpoints[-1] if checkpoints else None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that takes its name once all of it is on the disk; one of that name is replaced.

    Args:
        folder (`Path`): to make.
        fill (`Callable`): writes into the folder that it is given.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    fill(unfinished)
    for path in (*(path for path in unfinished.rglob("*") if path.is_file()), unfinished):
        _sync(path)
    _remove(folder)
    unfinished.rename(folder)
    _sync(folder.parent)


def prune(out_dir: Path, kept: Collection[int]) -> None:
    """Removes all checkpoints but those of some iterations."""
    for path in list_checkpoints(out_dir):
        if checkpoint_iteration(path) not in kept:
            _remove(path)


def publish(checkpoint: Path, out_dir: Path) -> None:
    """Copies the model of a checkpoint, file by file and each of them whole, to where `from_pretrained` looks."""
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not RUN_STATE.fullmatch(path.name):
            with open(path, "rb") as source, atomic_write(out_dir / path.name) as target:
                shutil.copyfileobj(source, target)


def _remove(folder: Path) -> None:
    """Removes a folder, which loses its name at once: what a kill leaves is no checkpoint."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
