"""Data parallelism and FSDP2 on two gloo processes against one process that sees all samples."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_gradtools import load_ghost_dataset
from tests.ghost.reference import (
    as_batch,
    llama,
    per_sample_gradients,
    reference_step,
    rows,
    sample_losses,
    validation_gradient,
)


pytestmark = pytest.mark.distributed
PORTS = iter(range(29_610 + os.getpid() % 1000, 40_000, 7))


def torchrun(module, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={next(PORTS)}"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", module, *map(str, args)], env=env, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("method", ["takeover", "contraction"])
def test_two_ranks_under_trainer(method, tmp_path):
    torchrun("tests.distributed.run_ddp", tmp_path, method)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in range(2)]
    data = load_ghost_dataset(tmp_path / "ghost").with_format("numpy")[:]
    assert float(data["residual"].max()) < 1e-5
    for n in range(3):
        for rank in range(2):
            step = ranks[rank]["steps"][n]
            mine = data["dot_product"][(data["step"] == n + 1) & (data["rank"] == rank)]
            expected, _ = reference_step(llama(), step, as_batch(rows(5, seed=9)))
            torch.testing.assert_close(torch.tensor(mine).double(), expected, rtol=1e-4, atol=1e-7)
    keys = list(zip(data["step"], data["sample_id"], strict=True))
    assert len(keys) == len(set(keys)) == 30  # 2 ranks x 3 rows x 5 micro-batches
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name


@pytest.mark.parametrize("method", ["auto", "contraction"])
def test_fsdp2_in_a_bare_loop(method, tmp_path):
    torchrun("tests.distributed.run_fsdp", tmp_path, method)
    results = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    model, data, val = llama(tie=False).double(), rows(8), as_batch(rows(4, seed=9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        target = validation_gradient(model, val)
        model.zero_grad()
        for rank in range(2):
            batch = as_batch(data.select(range(rank * 4, rank * 4 + 4)))
            count = 2 * (batch["labels"][:, 1:] != -100).sum()  # each rank's mean, then the mean over ranks
            grads = list(per_sample_gradients(model, sample_losses(model, batch, count)))
            dots = torch.stack([sum((g * t).sum() for g, t in zip(x, target, strict=True)) for x in grads])
            norms = torch.stack([sum(g.square().sum() for g in x) for x in grads])
            mine, sq_norms, residual = results[rank][step]
            torch.testing.assert_close(mine, dots, rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(sq_norms, norms, rtol=1e-4, atol=1e-9)
            assert residual < 1e-5
            for p, *parts in zip(model.parameters(), *grads, strict=True):
                p.grad = sum(parts) if p.grad is None else p.grad + sum(parts)
        optimizer.step()
