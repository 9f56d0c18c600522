"""A Slurm job that runs the five phases, the layers shared out over GPUs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig
from hf_gradtools.ghosttrack.settings.layer_selection import format_layers, split_layers


__all__ = ["PHASES", "make_sbatch"]

PHASES = ("extract", "train", "track", "detect", "evaluate")


def make_sbatch(
    config: GhostTrackConfig,
    gpus: int = 4,
    *,
    config_path: str,
    job_name: str = "full_pipeline",
    time: str = "24:00:00",
    partition: str | None = None,
    account: str | None = None,
    cpus_per_gpu: int = 8,
    memory_gb_per_gpu: int = 64,
    overrides: Sequence[str] = (),
    setup: Sequence[str] = (),
) -> str:
    """The text of a job script for `sbatch`; it also runs without Slurm.

    Extraction and training run one process per GPU, each with neighbouring layers; the later phases follow tracks from
    layer to layer and run in one process. A phase begins when every layer of the one before is done; if a layer fails,
    the others of its phase finish, then the job fails. The variables `EXTRACT_BATCH_SIZE` and `TRAIN_BATCH_SIZE` of
    the environment go before the configuration's. Submitted again, the job goes on, since each phase does.

    Args:
        config (`GhostTrackConfig`): as read from `config_path` with `overrides`.
        gpus (`int`, defaults to 4): at most one per layer.
        config_path (`str`): what the job passes as `--config`: a shipped name, or a file as seen from the folder that
            the job is submitted in.
        job_name (`str`, defaults to `"full_pipeline"`): of the job and its log.
        time (`str`, defaults to `"24:00:00"`): limit of the job.
        partition (`str`, *optional*): to submit to.
        account (`str`, *optional*): to charge.
        cpus_per_gpu (`int`, defaults to 8): CPU cores.
        memory_gb_per_gpu (`int`, defaults to 64): host memory.
        overrides (`Sequence[str]`): `section.key=value`, passed on to each command.
        setup (`Sequence[str]`): lines of bash to run first, such as `source .venv/bin/activate`; written as they are.

    Returns:
        `str`: the script.

    Raises:
        ValueError: there are more GPUs than layers, or a setting cannot stand in a `#SBATCH` line.
    """
    groups = split_layers(config.layers, gpus)
    for name, number in (("cpus_per_gpu", cpus_per_gpu), ("memory_gb_per_gpu", memory_gb_per_gpu)):
        if number < 1:
            raise ValueError(f"{name}={number} is not positive; need at least 1.")
    directives = {
        "job-name": job_name,
        "output": "%x-%j.log",
        "nodes": 1,
        "ntasks": 1,
        "gres": f"gpu:{gpus}",
        "cpus-per-task": cpus_per_gpu * gpus,
        "mem": f"{memory_gb_per_gpu * gpus}G",
        "time": time,
    }
    directives |= {
        name: value for name, value in (("partition", partition), ("account", account)) if value is not None
    }
    for name, value in directives.items():
        if not re.fullmatch(r"[\w.,:%+@/-]+", str(value), re.ASCII):
            raise ValueError(
                f"{name}={value!r} cannot stand in a #SBATCH line; need letters, digits and .,:%+@/-_ only."
            )
    command = ["hf-gradtools", "ghosttrack", "sbatch", "--config", config_path, "--gpus", str(gpus)]
    if job_name != "full_pipeline":
        command += ["--job-name", job_name]
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # `{#` is bash
        autoescape=False,  # what goes into the script is quoted for bash
    )
    return environment.get_template("pipeline.sbatch.j2").render(
        layer_count=len(config.layers),
        model=_one_line(config.model.base_model),
        gpus=gpus,
        made_by=_one_line(shlex.join(command)),
        directives=list(directives.items()),
        extract_batch_size=config.extraction.batch_size,
        train_batch_size=config.sae_training.batch_size,
        config=shlex.quote(config_path),
        logs=shlex.quote(str(Path(config.paths.results_dir).expanduser() / "logs")),
        overrides="".join(f" --set {shlex.quote(override)}" for override in overrides),
        groups=" ".join(format_layers(group) for group in groups),
        all_layers=format_layers(config.layers),
        setup=list(setup),
        devices=",".join(map(str, range(gpus))),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
