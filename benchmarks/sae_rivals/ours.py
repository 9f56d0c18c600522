"""hf_gradtools: an SAE, stepped as the trainer of `hf_gradtools.sae` does, with its defaults."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.modeling_sae import SAE
from sae_rivals.worker import Job, main


LEARNING_RATE = 2e-3


class Ours:
    def __init__(self, job: Job, train: Tensor):
        self.job = job
        self.sae = SAE(SAEConfig(train.shape[1], job.d_sae, activation=job.activation, k=job.k), seed=job.seed)
        sample = train[:16384]
        mean = sample.mean(0)
        self.scale = float(train.shape[1] ** 0.5 / (sample - mean).square().sum(1).mean().sqrt())
        self.sae.b_dec.data.copy_(mean * self.scale)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=job.learning_rate or LEARNING_RATE, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Warm-up over 5 % of the run, then linearly to zero."""
        return min(1.0, (step + 1) / self.job.short_warmup_steps) * max(0.0, 1 - step / self.job.steps)

    def step(self, batch: Tensor) -> None:
        with self.job.autocast():
            loss = self.sae(batch * self.scale).loss
        loss.backward()
        self.sae.remove_parallel_gradient_()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.sae.normalize_decoder_()

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.eval()(x * self.scale).reconstruction / self.scale


if __name__ == "__main__":
    main(Ours, "hf_gradtools")
