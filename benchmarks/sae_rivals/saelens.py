"""SAELens: its training SAEs, stepped as `SAETrainer.fit` does, with its defaults."""

from __future__ import annotations

from sae_lens import JumpReLUTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_rivals.worker import Job, main


class SAELens:
    def __init__(self, job: Job, train: Tensor):
        sizes = {"d_in": train.shape[1], "d_sae": job.d_sae}
        if job.activation == "jumprelu":
            sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes))
        else:
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=job.k, **sizes))
        rate = (
            {} if job.learning_rate is None else {"lr": job.learning_rate, "lr_warm_up_steps": job.short_warmup_steps}
        )
        total = job.steps * job.batch
        config = SAETrainerConfig(
            total_training_samples=total, train_batch_size_samples=job.batch, autocast=job.dtype == "bfloat16",
            lr_end=(job.learning_rate or 3e-4) / 10, **rate,
        )  # fmt: skip
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(self, batch: Tensor) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.sae.eval()(x)


if __name__ == "__main__":
    main(SAELens, "sae-lens")
