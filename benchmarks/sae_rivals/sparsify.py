"""sparsify: its coder, stepped as the hook in `Trainer.fit` does.

Its trainer gets activations from a model only, so its step is spelt out here. Default: SignSGD with schedule-free
momentum; where the job names a learning rate, Adam, its trainer's other choice.
"""

from __future__ import annotations

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from sae_rivals.worker import Job, main


class Sparsify:
    def __init__(self, job: Job, train: Tensor):
        torch.set_float32_matmul_precision("high")  # as its trainer does
        self.job = job
        self.coder = SparseCoder(
            train.shape[1], SparseCoderConfig(num_latents=job.d_sae, k=job.k), dtype=torch.float32
        )
        self.tokens_since_fired = torch.zeros(job.d_sae, dtype=torch.long)
        self.scheduler = None
        if job.learning_rate is None:
            rate = 5e-3 / (job.d_sae / 2**14) ** 0.5
            self.optimizer = ScheduleFreeWrapper(SignSGD(self.coder.parameters(), lr=rate), momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=job.learning_rate)
            self.scheduler = get_linear_schedule_with_warmup(self.optimizer, job.short_warmup_steps, job.steps)
        self.started = False

    def step(self, batch: Tensor) -> None:
        coder = self.coder
        if not self.started:
            coder.b_dec.data = batch.mean(0)
            self.started = True
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (batch - batch.mean(0)).pow(2).sum()
        with self.job.autocast():
            out = coder(x=batch, y=batch, dead_mask=None, total_variance=total_variance)
        fired = torch.zeros_like(self.tokens_since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.tokens_since_fired += len(batch)
        self.tokens_since_fired[fired] = 0

    def reconstruct(self, x: Tensor) -> Tensor:
        if isinstance(self.optimizer, ScheduleFreeWrapper):
            self.optimizer.eval()
        return self.coder(x).sae_out


if __name__ == "__main__":
    main(Sparsify, "eai-sparsify")
