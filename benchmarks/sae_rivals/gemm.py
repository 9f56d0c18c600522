"""The floor: one encoder product per batch, nothing else, in float32 or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_rivals.worker import Job, main


class Gemm:
    def __init__(self, job: Job, train: Tensor):
        self.dtype = getattr(torch, job.dtype)
        self.weight = torch.randn(job.d_sae, train.shape[1], dtype=self.dtype)
        self.out = torch.empty(job.batch, job.d_sae, dtype=self.dtype)

    def step(self, batch: Tensor) -> None:
        torch.mm(batch.to(self.dtype), self.weight.mT, out=self.out)

    def reconstruct(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


if __name__ == "__main__":
    main(Gemm, "torch")
