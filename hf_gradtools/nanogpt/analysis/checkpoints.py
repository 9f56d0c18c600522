"""The checkpoints below a folder and how good they are: of `train`, of any Trainer, of nanoGPT."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from hf_gradtools.nanogpt.importing import load_checkpoint


__all__ = ["SORTS", "Checkpoint", "find_checkpoints", "read_checkpoint"]

STATE, FIGURES, NANOGPT = "trainer_state.json", "training.json", "ckpt.pt"
STEP = re.compile(r"checkpoint-\d+")
SORTS = ("loss", "path", "iter", "params")
# Files of others may hold anything under the names that we read.
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError, SafetensorError),
    *(TypeError, KeyError, AttributeError, ArithmeticError),
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk and what its run knew of it; None is what nothing there tells.

    Args:
        path: its folder, or nanoGPT's file, below the one that was searched.
        best_val: lowest validation loss of the run so far, in nats per token.
        best_iter: iteration of that loss.
        val_loss: validation loss of this very model.
        iter: iteration of this model.
        params: parameters, tied ones once.
        vocab_size: tokens it knows.
        better_than_chance: how many times likelier than a guess among all tokens the right one is,
            vocab_size / e^best_val.
        error: why it cannot be read, or empty.
    """

    path: str
    best_val: float | None = None
    best_iter: int | None = None
    val_loss: float | None = None
    iter: int | None = None
    params: int | None = None
    vocab_size: int | None = None
    better_than_chance: float | None = None
    error: str = ""


def find_checkpoints(
    directory: str | os.PathLike[str], path_regex: str | None = None, sort: str = "loss", reverse: bool = False
) -> list[Checkpoint]:
    """Reads all checkpoints below a folder; pickled code in a `ckpt.pt` is not run, such a file has an `error`.

    Args:
        directory (`str`): searched through all its folders but hidden ones.
        path_regex (`str`, *optional*): only paths in which it is found.
        sort (`str`, defaults to `"loss"`): `"loss"` (best_val, the lowest first), `"path"`, `"iter"` or `"params"`.
        reverse (`bool`, defaults to `False`): the other way round; what has no such number stays last.

    Raises:
        ValueError: there is no such folder, or `path_regex` or `sort` is none.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"directory={str(directory)!r} is no folder; pass the one with the runs.")
    if sort not in SORTS:
        raise ValueError(f"sort={sort!r} is unknown; pass one of {', '.join(SORTS)}.")
    try:
        wanted = re.compile(path_regex or "")
    except re.error as error:
        raise ValueError(f"path_regex={path_regex!r} is no regular expression: {error}.") from error
    paths = [path for path in _candidates(directory) if wanted.search(str(path.relative_to(directory)))]
    found = [read_checkpoint(path, directory) for path in tqdm(paths, desc="Reading checkpoints", leave=False)]
    field = {"loss": "best_val"}.get(sort, sort)
    known = [checkpoint for checkpoint in found if _is_known(getattr(checkpoint, field))]
    known.sort(key=lambda checkpoint: (getattr(checkpoint, field), checkpoint.path), reverse=reverse)
    return known + sorted((x for x in found if not _is_known(getattr(x, field))), key=lambda x: x.path)


def read_checkpoint(path: str | os.PathLike[str], directory: str | os.PathLike[str] = ".") -> Checkpoint:
    """What is known of the model in a folder, or in a nanoGPT checkpoint; `path` is told as seen from `directory`."""
    path = Path(path)
    shown = os.path.relpath(path, directory)
    try:
        facts = _of_nanogpt(path) if path.is_file() else _of_folder(path)
        best, vocabulary = facts.get("best_val"), facts.get("vocab_size")
        chance = None if best is None or vocabulary is None else vocabulary * math.exp(-best)
    except UNREADABLE as error:
        return Checkpoint(shown, error=f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Checkpoint(shown, better_than_chance=chance, **facts)


def _candidates(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # unfinished ones begin so
        if STATE in files or FIGURES in files:
            yield Path(folder)
        yield from (Path(folder, name) for name in sorted(files) if name == NANOGPT)


def _of_nanogpt(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    best, iteration = checkpoint.get("best_val_loss"), checkpoint.get("iter_num")
    best, iteration = None if best is None else float(best), None if iteration is None else int(iteration)
    weights = {
        (tensor.data_ptr(), tensor.shape): tensor.numel()  # tied ones share their memory
        for name, tensor in checkpoint["model"].items()
        if not name.endswith((".attn.bias", ".attn.masked_bias")) or tensor.ndim != 4  # masks of early nanoGPTs
    }
    return {
        "best_val": best,
        "best_iter": iteration,  # it is written when the loss is the best
        "val_loss": best,
        "iter": iteration,
        "params": sum(weights.values()),
        "vocab_size": checkpoint["model_args"].get("vocab_size"),
    }


def _of_folder(folder: Path) -> dict[str, Any]:
    state, figures = _read_json(folder / STATE), _read_json(folder / FIGURES)
    is_run = bool(figures) and not STEP.fullmatch(folder.name)
    facts = _of_figures(figures) if is_run or not state else _of_state(state)
    params, vocabulary = figures.get("num_params"), figures.get("vocab_size")
    facts["params"] = params if params is not None else _count_parameters(folder)
    facts["vocab_size"] = vocabulary if vocabulary is not None else _vocab_size(folder)
    return facts


def _of_state(state: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint that a run can go on from: it is the model of its own iteration."""
    losses = {row["step"]: row["eval_loss"] for row in state.get("log_history", []) if "eval_loss" in row}
    losses = {step: loss for step, loss in losses.items() if _is_known(loss)}
    best = min(losses, key=lambda step: losses[step]) if losses else None
    iteration = state.get("global_step")
    return {
        "best_val": None if best is None else losses[best],
        "best_iter": best,
        "val_loss": losses.get(iteration),
        "iter": iteration,
    }


def _of_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Of a run's own folder: it holds the best model."""
    best, iteration = figures.get("best_val_loss"), figures.get("best_val_iter")
    return {"best_val": best, "best_iter": iteration, "val_loss": best, "iter": iteration}


def _count_parameters(folder: Path) -> int | None:
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total if files else None


def _vocab_size(folder: Path) -> int | None:
    config = _read_json(folder / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return None if size is None else int(size)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no fields")
    return value


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
