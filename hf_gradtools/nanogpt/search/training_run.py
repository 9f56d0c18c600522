"""What a run of a sweep or a search is by default: a training, from flags.

Workers import this module, and leave torch to the processes of their runs.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from transformers.utils import logging

from hf_gradtools.nanogpt.search.execute import LOG, earlier_folders


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.hardware import HardwareReport
    from hf_gradtools.nanogpt.training import TrainResult

__all__ = ["PRELOAD", "check_flags", "layer_lists", "report_of_flags", "train_run"]

logger = logging.get_logger(__name__)

PRELOAD = ("hf_gradtools.nanogpt.search.preload",)
OUT_DIR, RUN = "out_dir", "run.json"


def train_run(flags: dict[str, Any], folder: Path) -> dict[str, float]:
    """Trains, and returns what `results.yaml` has of it; goes on from the last checkpoint of a run that was killed.

    Args:
        flags (`dict[str, Any]`): as [`~hf_gradtools.nanogpt.training.run_flags`] takes them.
        folder (`Path`): its `out_dir`.
    """
    from hf_gradtools.nanogpt.training import run_flags

    flags = {"progress": False, **flags, OUT_DIR: str(folder)}
    alone = {**flags, "overwrite_out_dir": True}  # the folder is its own: what is there is of a deleted journal
    echo = functools.partial(_append_line, folder / LOG)
    try:
        taken_up = _take_up(earlier_folders(folder), folder)
    except OSError as error:  # the killed attempt was on another machine, and is not quite dead
        logger.warning(f"{folder}: trained from the start, since what was left of it cannot be read: {error}")
        taken_up = False
    if taken_up:
        result = run_flags({**flags, "init_from": "resume"}, echo=echo)
        if result.iter_latency_ms is not None:
            return metrics_of(result)
        # Only its record was missing. But it has to be timed.
    return metrics_of(run_flags(alone, echo=echo))


def _append_line(log: Path, line: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _take_up(earlier: Iterable[Path], folder: Path) -> bool:
    """Copies the checkpoints of a killed attempt; its own stay, for its process may still write."""
    from hf_gradtools.workflow.checkpoints import last_checkpoint, list_checkpoints, write_folder

    for killed in earlier:
        checkpoints = list_checkpoints(killed)
        if checkpoints and (killed / RUN).exists():
            shutil.copy2(killed / RUN, folder / RUN)
            for checkpoint in checkpoints:  # the earliest first: what a kill leaves is a run that has come less far
                copy = functools.partial(shutil.copytree, checkpoint, dirs_exist_ok=True)
                write_folder(folder / checkpoint.name, copy)
            return last_checkpoint(folder) is not None
    return False


def metrics_of(result: TrainResult) -> dict[str, float]:
    """A result under the seed's names; what was not measured is left out."""
    metrics = {
        "best_val_loss": result.best_val_loss,
        "best_val_iter": result.best_val_iter,
        "num_params": result.num_params,
        "better_than_chance": result.better_than_chance,
        "btc_per_param": result.better_than_chance / result.num_params,
        "peak_gpu_mb": result.peak_memory_mb,
        "iter_latency_avg": result.iter_latency_ms,
        "val_loss": result.val_loss,
        "train_loss": result.train_loss,
        "iters": result.iters,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def check_flags(configs: Iterable[Mapping[str, Any]]) -> None:
    """ValueError if a configuration has a name that is no flag of a training, or a value that its flag cannot have."""
    from hf_gradtools.nanogpt.training.run import split_flags

    for config in configs:
        if OUT_DIR in config:
            raise ValueError("out_dir is in the configuration; every run gets a folder of its own. Leave it out.")
        split_flags(config)


def report_of_flags(flags: Mapping[str, Any]) -> HardwareReport:
    """The hardware report of the model that flags describe, at the end of a block.

    Raises:
        ValueError: the model is not described by flags, or is none.
    """
    from hf_gradtools.nanogpt.hardware import hardware_report
    from hf_gradtools.nanogpt.training.run import config_of_flags

    return hardware_report(config_of_flags(flags))


def layer_lists() -> list[str]:
    """The flags whose lists are cycled over the layers."""
    from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
    from hf_gradtools.nanogpt.training.starting import config_fields

    types = get_annotations(NanoGPTConfig, eval_str=True)
    return [name for name in config_fields() if any(get_origin(kind) is list for kind in get_args(types[name]))]
