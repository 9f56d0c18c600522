"""Flags of `hf-gradtools nanogpt sweep` and `search`. Imports nothing heavy, so that they are shown at once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

from hf_gradtools.nanogpt.search.liveness import STALE_SECONDS


__all__ = ["SearchArguments", "SweepArguments"]


def _in(group: str, default: Any = None, **more: Any) -> Any:
    if default is MISSING:
        return field(metadata={"group": group, **more})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"group": group, **more})
    return field(default=default, metadata={"group": group, **more})


@dataclass
class SweepArguments:
    """An exploration and how it is run.

    Args:
        config: YAML or JSON file of the exploration.
        config_format: yaml or json; default by the ending of the file.
        output_dir: folder in which the sweep gets one of its own, named after the file.
        prefix: of the names of runs, and of that folder.
        use_timestamp: begin a new sweep, in a folder with the time in its name.
        include_common_group_in_name: values of common_group are part of the names of runs.
        expand_named_groups_in_names: names of runs have the values of named groups, not their names.
        dry_run: list the runs, and run none.
        workers: runs at the same time on this machine; the same command on other machines that share output_dir adds
            theirs.
        gpus: each of several workers sees one of these, in turn; default those that CUDA_VISIBLE_DEVICES lists.
        spawn_subprocess: each run in a process of its own, so that a crash is its failure alone.
        retry_failed: run again what has failed.
        retry_stale: take over at once what workers of other machines hold, instead of after stale_seconds.
        stale_seconds: a worker of another machine that is silent for so long is dead.
        storage: URL of an Optuna storage, instead of the journal in the sweep's folder.
        progress: show a progress bar.
    """

    config: str = _in("Exploration", MISSING, aliases=["-c"])
    config_format: str | None = _in("Exploration")
    output_dir: str = _in("Exploration", "out", aliases=["-o"])
    prefix: str = _in("Exploration", "")
    use_timestamp: bool = _in("Exploration", False)
    include_common_group_in_name: bool = _in("Exploration", False)
    expand_named_groups_in_names: bool = _in("Exploration", False)
    dry_run: bool = _in("Exploration", False)
    workers: int = _in("Running", 1)
    gpus: list[str] = _in("Running", [])
    spawn_subprocess: bool = _in("Running", True)
    retry_failed: bool = _in("Running", False)
    retry_stale: bool = _in("Running", False)
    stale_seconds: float = _in("Running", STALE_SECONDS)
    storage: str | None = _in("Running")
    progress: bool = _in("Running", True)


@dataclass
class SearchArguments:
    """A configuration, what is varied in it, and by what is chosen.

    Args:
        orig_settings: YAML or JSON file of flags to begin with.
        param_names: flags to vary: numbers, or lists of them.
        increments: for each of param_names, or one for all.
        override_cfg: flags that replace those of orig_settings, as KEY=VALUE.
        iterations: multiples of its increment that are tried of each flag.
        direction: up adds increments, down subtracts them, both does both.
        nlayer_dup_mode: a layer more is a copy of the middle one (dup_middle), or of each in its own candidate
            (dup_each).
        num_iterations: the most rounds.
        random_iterations: seeds for each candidate.
        efficiency_target: the cost: params, vram or iter as a run measured it; macs, exp or kv_bytes of a token from
            the hardware report.
        noise_guard: with several seeds, standard errors that a gain must exceed.
        max_iters_increase: where no candidate is accepted, train so much longer instead of stopping.
        results_file: YAML file of the rounds.
        plot: file of the figure of the path; default path.png in output_dir.
        output_dir: folder of the runs; default results_file without its ending.
        workers: runs at the same time on this machine; the same command on other machines that share output_dir adds
            theirs.
        gpus: each of several workers sees one of these, in turn; default those that CUDA_VISIBLE_DEVICES lists.
        spawn_subprocess: each run in a process of its own, so that a crash is a failed candidate.
        retry_failed: run again what has failed.
        stale_seconds: a worker of another machine that is silent for so long is dead.
        storage: URL of an Optuna storage, instead of the journal in output_dir.
        progress: show a progress bar for each round.
    """

    orig_settings: str = _in("Search", MISSING)
    param_names: list[str] = _in("Search", MISSING)
    increments: list[float] = _in("Search", MISSING)
    override_cfg: list[str] = _in("Search", [])
    iterations: int = _in("Search", 1)
    direction: str = _in("Search", "up")
    nlayer_dup_mode: str = _in("Search", "dup_middle")
    num_iterations: int = _in("Search", 1)
    random_iterations: int = _in("Search", 1)
    efficiency_target: str = _in("Search", "params")
    noise_guard: float = _in("Search", 1.0)
    max_iters_increase: int | None = _in("Search")
    results_file: str = _in("Results", "sweep_log.yaml")
    plot: str | None = _in("Results")
    output_dir: str | None = _in("Results")
    workers: int = _in("Running", 1)
    gpus: list[str] = _in("Running", [])
    spawn_subprocess: bool = _in("Running", True)
    retry_failed: bool = _in("Running", False)
    stale_seconds: float = _in("Running", STALE_SECONDS)
    storage: str | None = _in("Running")
    progress: bool = _in("Running", True)

    def __post_init__(self) -> None:
        if len(self.increments) == 1:
            self.increments = self.increments * len(self.param_names)
        if len(self.increments) != len(self.param_names):
            raise ValueError(
                f"increments={self.increments} are {len(self.increments)} for {len(self.param_names)} param_names. "
                "Pass one for each, or one for all."
            )
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} must be at least 1.")

    def steps(self) -> dict[str, float]:
        """Increment by parameter."""
        return dict(zip(self.param_names, self.increments, strict=True))
