"""dictionary_learning: its top-k trainer's own `update`, with its defaults.

Its default warm-up of 1000 steps must be shorter than the run; where it is not, a tenth of the run is taken.
"""

from __future__ import annotations

from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from sae_rivals.worker import Job, main


class DictionaryLearning:
    def __init__(self, job: Job, train: Tensor):
        self.job, self.steps_done = job, 0
        warmup = 1000 if job.steps > 1000 else job.steps // 10
        self.trainer = TopKTrainer(
            steps=job.steps, activation_dim=train.shape[1], dict_size=job.d_sae, k=job.k, layer=0, lm_name="none",
            lr=job.learning_rate, warmup_steps=warmup if job.learning_rate is None else job.short_warmup_steps,
            seed=job.seed, device="cpu",
        )  # fmt: skip

    def step(self, batch: Tensor) -> None:
        with self.job.autocast():
            self.trainer.update(self.steps_done, batch)
        self.steps_done += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


if __name__ == "__main__":
    main(DictionaryLearning, "dictionary-learning")
