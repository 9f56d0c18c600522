"""FSDP2 on two gloo ranks in a bare loop; started by test_distributed.py through torchrun."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hf_gradtools import GhostDotProd
from tests.ghost.reference import as_batch, llama, rows


def main(path: Path, method: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = llama(tie=False)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    data, val = rows(8), rows(4, seed=9)
    mine = as_batch(data.select(range(rank * 4, rank * 4 + 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    with GhostDotProd(model, method=method, shifts_labels=True, grad_norms=True) as engine:
        for _ in range(2):
            model.train()
            engine.validate([as_batch(val.select(range(rank * 2, rank * 2 + 2)))])
            model(**mine).loss.backward()
            scores = engine.scores()
            results.append((scores.dots[0], scores.sq_norms, scores.residual))
            optimizer.step()
            optimizer.zero_grad()
    torch.save(results, path / f"rank{rank}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
