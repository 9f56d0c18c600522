"""What all workers share: the job's flags, the loop that is timed, held-out FVU, one line of JSON.

Needs torch and safetensors only, for it runs in every rival's environment.

Shape legend: N tokens · B tokens of a batch · D d_in · F d_sae.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Args:
        activations: safetensors file with `train [N, D]` and `heldout [M, D]`, in any floating dtype.
        tokens: to train on inside the clock.
        warmup_tokens: to train on before it.
        dtype: `"float32"`, or `"bfloat16"`: the library's own mixed precision, else CPU autocast around its step.
        learning_rate: None for the library's default optimiser, rate and schedule.
        fvu: also measure the held-out FVU at the end.
    """

    activations: str
    d_sae: int = 4096
    k: int = 32
    activation: str = "topk"
    batch: int = 4096
    dtype: str = "float32"
    tokens: int = 32768
    warmup_tokens: int = 8192
    learning_rate: float | None = None
    fvu: bool = False
    seed: int = 0

    @property
    def steps(self) -> int:
        return -(-(self.tokens + self.warmup_tokens) // self.batch)

    @property
    def short_warmup_steps(self) -> int:
        """Of the learning rate, where the job names one: 5 % of the run."""
        return max(1, self.steps // 20)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def as_flags(self) -> list[str]:
        pairs = {name: value for name, value in asdict(self).items() if value is not None and name != "fvu"}
        return [f"--{name}={value}" for name, value in pairs.items()] + ["--fvu"] * self.fvu


class Trained(Protocol):
    """An SAE being trained by its library."""

    def step(self, batch: Tensor) -> None:
        """One training step, all that the library's trainer does in one."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """As after training."""


def batches(train: Tensor, batch: int) -> Iterator[Tensor]:
    """Consecutive rows, from the start again at the end; the file is shuffled already."""
    whole = len(train) // batch * batch
    if not whole:
        raise ValueError(f"the activations have {len(train)} training rows; need at least batch={batch}.")
    while True:
        yield from train[:whole].split(batch)


def heldout_fvu(reconstruct: Callable[[Tensor], Tensor], heldout: Tensor) -> float:
    """Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    with torch.no_grad():
        residual = sum(float((x - reconstruct(x).float()).double().square().sum()) for x in heldout.split(2048))
    return residual / float((heldout - heldout.mean(0)).double().square().sum())


def run(job: Job, build: Callable[[Job, Tensor], Trained]) -> dict[str, float | int | None]:
    """Trains and measures; the batches are cut outside of what the library does, and cost it nothing."""
    tensors = {name: tensor.float() for name, tensor in load_file(job.activations).items()}
    train, heldout = tensors["train"], tensors["heldout"]
    torch.manual_seed(job.seed)
    trained, source = build(job, train), batches(train, job.batch)
    for _ in range(job.warmup_tokens // job.batch):
        trained.step(next(source))
    steps = max(1, job.tokens // job.batch)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        trained.step(next(source))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = steps * job.batch
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
        "threads": torch.get_num_threads(),
        "fvu": heldout_fvu(trained.reconstruct, heldout) if job.fvu else None,
    }


def main(build: Callable[[Job, Tensor], Trained], distribution: str) -> None:
    """Entry point of every worker: flags in, one line of JSON out, after whatever the library prints.

    Args:
        build: makes the SAE and what trains it.
        distribution: name under which pip knows the library, whose version is told.
    """
    parser = argparse.ArgumentParser()
    types = {"d_sae": int, "k": int, "batch": int, "tokens": int, "warmup_tokens": int, "seed": int}
    for field in fields(Job):
        if field.name == "fvu":
            parser.add_argument("--fvu", action="store_true")
        else:
            kind = float if field.name == "learning_rate" else types.get(field.name, str)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    job = Job(**vars(parser.parse_args()))
    print(json.dumps({"version": f"{distribution} {version(distribution)}"} | run(job, build)), flush=True)
