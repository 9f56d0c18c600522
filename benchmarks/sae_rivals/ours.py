"""hf_gradtools: an SAE, stepped by the learner that `SAETrainer` steps, with its defaults."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.learner import Learner
from hf_gradtools.sae.training_config import SAETrainingConfig
from sae_rivals.worker import Job, main


class Ours:
    def __init__(self, job: Job, train: Tensor):
        rate = {} if job.learning_rate is None else {"learning_rate": job.learning_rate}
        args = SAETrainingConfig(
            output_dir="unused", batch_tokens=job.batch, bf16=job.dtype == "bfloat16", seed=job.seed, **rate
        )
        config = SAEConfig(train.shape[1], job.d_sae, activation=job.activation, k=job.k)
        self.learner = Learner(config, args, job.steps, torch.device("cpu"))
        self.learner.calibrate(train[: args.calibration_tokens])

    def step(self, batch: Tensor) -> None:
        self.learner.take_step(batch)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.learner.finished()(x).reconstruction


if __name__ == "__main__":
    main(Ours, "hf_gradtools")
