"""Training of sparse autoencoders at several hookpoints from one stream of activations."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradtools.sae.checkpoints import LearnerCheckpoints
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.learner import Learner
from hf_gradtools.sae.modeling_sae import SAE, SAEOutput
from hf_gradtools.sae.outliers import Inliers
from hf_gradtools.sae.shuffling import ActivationSource, ShuffledBatches
from hf_gradtools.sae.training_config import SAETrainingConfig


__all__ = ["SAETrainer"]


class SAETrainer:
    """Trains an autoencoder at each hookpoint of a source of activations, all of them in one pass over it.

    Each comes out as if it had been trained alone: they share the order of tokens, not a gradient, a clipping norm
    or a random number. A killed run that is resumed gives the files of one that was not.

    With several processes (`torchrun`, `accelerate launch`), `args.parallel` says what they share out: `"layers"`, so
    that each process trains some of the autoencoders, or `"data"`, so that each takes a part of every batch.

    Args:
        configs ([`SAEConfig`] or `Mapping[str, SAEConfig]`): the autoencoder of every hookpoint, or of each.
            `hookpoint` is filled in; `d_in` must be what the source has there.
        source ([`ModelActivations`] or of [`ActivationStore.source`]): the activations.
        args ([`SAETrainingConfig`]): how to train.
        eval_source (*optional*): activations that training does not see; the figures kept with the finished
            autoencoders are measured on them, but for outliers where training leaves those out.

    Attributes:
        log_history (`list[dict[str, float]]`): what was logged, as in a `Trainer`'s state.

    Raises:
        ValueError: hookpoints or widths do not fit the source, or a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        configs: SAEConfig | Mapping[str, SAEConfig],
        source: ActivationSource,
        args: SAETrainingConfig,
        eval_source: ActivationSource | None = None,
    ):
        self.args, self.source, self.eval_source = args, source, eval_source
        self.configs = _configs_of(configs, source)
        self.batches = ShuffledBatches(source, args.batch_tokens, args.buffer_tokens, args.seed, args.epochs)
        self.num_steps = min(len(self.batches), args.max_steps or len(self.batches))
        trackers = None if args.report_to == "none" else args.report_to
        self.accelerator = Accelerator(log_with=trackers, project_dir=args.output_dir, cpu=args.use_cpu)
        self.log_history: list[dict[str, float]] = []
        world = self.accelerator.num_processes
        if args.parallel == "data" and args.batch_tokens % world:
            raise ValueError(
                f"batch_tokens={args.batch_tokens} cannot be shared out evenly by {world} processes. "
                f"Pass a multiple of {world}, or parallel='layers'."
            )

    @property
    def own_hookpoints(self) -> list[str]:
        """Those that this process trains."""
        names = list(self.configs)
        if self.args.parallel == "data":
            return names
        return names[self.accelerator.process_index :: self.accelerator.num_processes]

    def train(self, resume: bool = False) -> dict[str, SAE]:
        """Trains, and saves each autoencoder to `<output_dir>/<hookpoint>`.

        Args:
            resume (`bool`): whether to go on where an earlier run in `output_dir` ended, or to begin if there is none.
                Otherwise checkpoints that are there are an error.

        Returns:
            `dict[str, SAE]`: those that this process trained (all of them, on one), in evaluation mode.
        """
        checkpoints = LearnerCheckpoints(Path(self.args.output_dir), writes=self._writes)
        hookpoints = self.own_hookpoints
        finished = checkpoints.finished(hookpoints, self.identity) if resume else {}
        if not resume:
            checkpoints.refuse_any(hookpoints)
        device = self.accelerator.device
        learners = {
            name: Learner(self.configs[name], self.args, self.num_steps, device)
            for name in hookpoints
            if name not in finished
        }
        if learners:
            step = checkpoints.load_newest(learners, self.identity) if resume else 0
            self._run(learners, checkpoints, step)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:  # alone: the card tells of all autoencoders in the folder
            checkpoints.write_card()
        self.accelerator.wait_for_everyone()
        return {
            name: finished[name] if name in finished else SAE.from_pretrained(self.args.output_dir, name)
            for name in hookpoints
        }

    def identity(self, hookpoint: str) -> dict[str, Any]:
        """What a resumed training must share with the one it continues."""
        source = {"num_tokens": self.source.num_tokens, "dtype": str(self.source.dtype)}
        return {"config": self.configs[hookpoint].to_dict(), "training": self.args.identity(), "source": source}

    def _run(self, learners: Mapping[str, Learner], checkpoints: LearnerCheckpoints, start: int) -> None:
        # Neither read nor shuffle what others train, or have trained.
        self.batches.source = copy.copy(self.source)
        self.batches.source.hookpoints = list(learners)
        stream = self.batches.iterate(start)
        if start == 0:
            stream = self._calibrated(learners, stream)
        meter = _Meter(learners)
        if self.args.report_to != "none":
            self.accelerator.init_trackers("sae", config=dataclasses.asdict(self.args))
        bar = tqdm(
            total=self.num_steps * self.args.batch_tokens,
            initial=start * self.args.batch_tokens,
            unit="tok",
            unit_scale=True,
            desc=f"Training {len(learners)} SAE{'s' if len(learners) > 1 else ''}",
            disable=not self.accelerator.is_local_main_process,
        )
        for step, batch in enumerate(itertools.islice(stream, self.num_steps - start), start + 1):
            for name, learner in learners.items():
                meter.add(name, self._step(learner, batch[name]))
            bar.update(self.args.batch_tokens)
            if step % self.args.logging_steps == 0 or step == self.num_steps:
                self._log(meter.read(), step, bar)
            if step % self.args.save_steps == 0 and step < self.num_steps:
                checkpoints.save(learners, step, self.identity)
        bar.close()
        for name, sae in self._finished(learners).items():
            checkpoints.finish(name, sae, self.identity)
        for tracker in self.accelerator.trackers:  # not end_training(), which ends the process group as well
            tracker.finish()

    def _calibrated(
        self, learners: Mapping[str, Learner], stream: Iterator[dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        """The same batches, the first of which have told every learner where to begin."""
        wanted = -(-self.args.calibration_tokens // self.args.batch_tokens)
        first = list(itertools.islice(stream, min(wanted, self.num_steps)))
        for name, learner in learners.items():
            learner.calibrate(torch.cat([batch[name] for batch in first])[: self.args.calibration_tokens])
        return itertools.chain(first, stream)

    def _step(self, learner: Learner, batch: Tensor) -> SAEOutput:
        world = self.accelerator.num_processes
        if self.args.parallel == "layers" or world == 1:
            return learner.take_step(batch)
        part = batch[self.accelerator.process_index :: world]
        return learner.take_step(part, share=1 / world, reduce=torch.distributed.all_reduce)

    def _finished(self, learners: Mapping[str, Learner]) -> dict[str, SAE]:
        """What was trained, with the figures of all from one pass over the held-out activations."""
        from hf_gradtools.sae.metrics import evaluate_store

        saes = {name: learner.finished() for name, learner in learners.items()}
        for name, sae in saes.items():
            facts = {**self.args.identity(), "tokens": self.num_steps * self.args.batch_tokens}
            if math.isfinite(learners[name].radius):  # JSON has no infinity
                facts["outlier_radius"] = learners[name].radius
            sae.config.metadata["training"] = facts
        if self.eval_source is not None and self._writes:
            bounds = {name: (learner.median, learner.radius) for name, learner in learners.items()}
            source = Inliers(self.eval_source, bounds)
            shows = self.accelerator.is_local_main_process
            for name, figures in evaluate_store(source, saes, progress=shows).items():
                saes[name].config.metadata["evaluation"] = figures.to_dict(density=False)
        return saes

    @property
    def _writes(self) -> bool:
        """Whether this process writes what it trains: with a part of each batch, all processes have the same."""
        return self.args.parallel == "layers" or self.accelerator.is_main_process

    def _log(self, figures: dict[str, float], step: int, bar: Any) -> None:
        figures = {**figures, "tokens": step * self.args.batch_tokens}
        self.log_history.append({**figures, "step": step})
        self.accelerator.log(figures, step=step)
        mean = [value for name, value in figures.items() if name.endswith("/fvu")]
        bar.set_postfix(fvu=f"{sum(mean) / len(mean):.4f}", refresh=False)


class _Meter:
    """Means of figures since they were last read, kept on the device."""

    def __init__(self, learners: Mapping[str, Learner]):
        self.learners = learners
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, hookpoint: str, output: SAEOutput) -> None:
        figures = {"loss": output.loss, "fvu": output.fvu, "l0": output.l0, "auxk": output.auxk}
        for name, value in figures.items():
            self.sums.setdefault(f"{hookpoint}/{name}", []).append(value.detach())

    def read(self) -> dict[str, float]:
        means = {name: float(torch.stack(values).float().mean()) for name, values in self.sums.items()}
        self.sums.clear()
        for name, learner in self.learners.items():
            dead = learner.tokens_since_active >= learner.args.dead_after_tokens
            means[f"{name}/dead"] = float(dead.float().mean())
            means["learning_rate"] = learner.optimizer.param_groups[0]["lr"]
        return means


def _configs_of(configs: SAEConfig | Mapping[str, SAEConfig], source: ActivationSource) -> dict[str, SAEConfig]:
    """A configuration for each hookpoint of the source, checked against it."""
    given = dict.fromkeys(source.hookpoints, configs) if isinstance(configs, SAEConfig) else dict(configs)
    if missing := sorted(set(given) - set(source.hookpoints)):
        raise ValueError(
            f"configs name {', '.join(missing)}, which the source lacks; it has {', '.join(source.hookpoints)}."
        )
    for hookpoint, config in given.items():
        if config.d_in != source.d_in(hookpoint):
            raise ValueError(
                f"d_in={config.d_in} does not fit hookpoint {hookpoint!r}, where hidden states have width "
                f"{source.d_in(hookpoint)}. Pass SAEConfig(d_in={source.d_in(hookpoint)}, ...)."
            )
    return {name: dataclasses.replace(config, hookpoint=name) for name, config in given.items()}
