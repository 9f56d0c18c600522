"""One autoencoder in training: its weights, Adam's moments, its counters, and what one step does."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.sae.calibration import (
    data_directions,
    encoder_scale,
    geometric_median,
    scale_below_thresholds,
    unit_scale,
)
from hf_gradtools.sae.configuration_sae import WITH_K, SAEConfig
from hf_gradtools.sae.modeling_sae import SAE, SAEOutput
from hf_gradtools.sae.outliers import within
from hf_gradtools.sae.training_config import SAETrainingConfig, differing


__all__ = ["Learner"]

ADAM = ("exp_avg", "exp_avg_sq", "step")
CALIBRATED_TOKENS = 4096  # that the encoder's scale is taken from


class Learner:
    """An autoencoder, and all that its training needs to go on: two learners in the same state stay equal.

    Args:
        config ([`SAEConfig`]): the autoencoder.
        args ([`SAETrainingConfig`]): its training.
        num_steps (`int`): how many steps that is.
        device (`torch.device`): where it trains.

    Attributes:
        sae: sees inputs times `scale`; [`Learner.finished`] gives the one of the inputs themselves.
        step: steps taken.
        median: `[D]`, the middle of the hidden states.
        radius: hidden states farther from it are outliers.
        tokens_since_active: `[F]`, how long ago each feature was last active.
    """

    def __init__(self, config: SAEConfig, args: SAETrainingConfig, num_steps: int, device: torch.device):
        self.args, self.num_steps, self.device = args, num_steps, device
        self.sae = SAE(config, seed=args.seed).to(device).train()
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=args.learning_rate, betas=betas, fused=True)
        self.tokens_since_active = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.median = torch.zeros(config.d_in, device=device)
        self.radius = math.inf
        self.scale = 1.0
        self.step = 0

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Takes from hidden states `[N, D]` their median, scale and outliers, and where the weights begin."""
        x = x.to(self.device, torch.float32)
        if not bool(x.isfinite().all()):
            raise FloatingPointError(self._not_finite(x))
        median, seed = geometric_median(x), self.args.seed
        self.median.copy_(median)
        if self.args.outlier_ratio is not None:
            distances = (x - self.median).norm(dim=1)
            typical = float(distances.median())
            if typical > 1e-6 * float(distances.mean()):  # else most are equal, and their distances are rounding alone
                self.radius = self.args.outlier_ratio * typical
            x = x[distances <= self.radius]
        if self.args.normalize_input:
            self.scale = unit_scale(x, self.median)
        centred = (x - self.median) * self.scale
        sae = self.sae
        sae.b_dec.copy_(self.median * self.scale)
        if self.args.decoder_init == "data":
            sae.W_dec.copy_(data_directions(x, self.median, self._config.d_sae, seed))
            sae.W_enc.copy_(sae.W_dec)
        self._scale_encoder(centred[:CALIBRATED_TOKENS])

    def take_step(self, x: Tensor, share: float = 1.0, reduce: Callable[[Tensor], object] | None = None) -> SAEOutput:
        """One optimizer step.

        Args:
            x (`Tensor`): `[N, D]` hidden states, of any floating type.
            share (`float`): of the whole batch that these are, if several processes have parts of it.
            reduce (`Callable`, *optional*): sums a tensor over those processes, in place.
        """
        self._schedule()
        dead = self.tokens_since_active >= self.args.dead_after_tokens
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            output = self.sae(within(x.to(self.device, torch.float32), self.median, self.radius) * self.scale, dead)
        if not bool(output.loss.detach().isfinite()):
            raise FloatingPointError(self._not_finite(x))
        (output.loss * share).backward()
        active = output.latents.pattern.count((output.latents.values.detach() > 0).float())
        if reduce is not None:
            for tensor in (*(p.grad for p in self.sae.parameters()), active):
                reduce(tensor)
        self._update(output)
        if reduce is not None and self._config.activation == "batchtopk":  # whose parts had thresholds of their own
            reduce(self.sae.threshold.mul_(share))
        self.tokens_since_active.add_(round(len(x) / share)).masked_fill_(active > 0, 0)
        self.step += 1
        return output

    def finished(self) -> SAE:
        """A copy for the hidden states themselves, with the input's scale folded into the weights."""
        sae = copy.deepcopy(self.sae).requires_grad_(True).eval()
        sae.annealed_k, sae.sparsity_weight = None, 1.0
        sae.fold_scale_(self.scale)
        return sae

    # ---- on disk

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes everything to one file, which appears whole or not at all."""
        header = {"step": self.step, "scale": self.scale, "radius": self.radius, "identity": identity}
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={"learner": json.dumps(header)}))

    def load(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        """Goes back to a state that [`Learner.save`] wrote.

        Raises:
            ValueError: it is the state of another training.
        """
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["learner"])
            if changed := differing(header["identity"], json.loads(json.dumps(identity))):
                raise ValueError(
                    f"{path} is of a training with {'; '.join(changed)}. Resume with the same options, or train in "
                    "another folder."
                )
            self._prepare_moments()
            for name, tensor in self._tensors().items():
                tensor.copy_(file.get_tensor(name))
        self.step, self.scale, self.radius = header["step"], header["scale"], header["radius"]

    @torch.no_grad()
    def _prepare_moments(self) -> None:
        """Makes Adam's state exist, as its first step would."""
        for parameter in self.sae.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"sae.{name}": tensor.detach() for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            tensors |= {f"adam.{name}.{key}": self.optimizer.state[parameter][key] for key in ADAM}
        return {**tensors, "tokens_since_active": self.tokens_since_active, "median": self.median}

    # ---- a step's parts

    def _scale_encoder(self, centred: Tensor) -> None:
        """Scales the encoder so that the first reconstructions are as long as what they are of."""
        sae = self.sae
        if self._config.activation != "jumprelu":
            sae.W_enc.mul_(encoder_scale(centred, sae(centred + sae.b_dec).reconstruction - sae.b_dec))
            return
        whole, some = sae.W_enc.clone(), centred[: CALIBRATED_TOKENS // 8]

        def reconstructed(scale: float) -> Tensor:
            sae.W_enc.copy_(whole * scale)
            return sae(some + sae.b_dec).reconstruction - sae.b_dec

        sae.W_enc.copy_(whole * scale_below_thresholds(some, reconstructed))

    def _not_finite(self, x: Tensor) -> str:
        where = f"at {self._config.hookpoint!r}, step {self.step + 1}"
        if bool(x.isfinite().all()):
            return f"the loss {where} is not finite. Pass a smaller learning_rate, or max_grad_norm=1."
        return f"hidden states {where} are not finite. Run the model in another dtype: bfloat16 or float32."

    @property
    def _config(self) -> SAEConfig:
        return self.sae.config

    def learning_rate(self) -> float:
        """That of the next step."""
        args, done = self.args, self.step / self.num_steps
        rise = min(1.0, (self.step + 1) / max(1, args.warmup_fraction * self.num_steps))
        if args.lr_scheduler_type == "constant" or done <= args.decay_start:
            return args.learning_rate * rise
        return args.learning_rate * rise * (1 - done) / (1 - args.decay_start)

    def _schedule(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        args, config, done = self.args, self._config, self.step / self.num_steps
        if args.k_start is not None and config.activation in WITH_K:
            left = max(0.0, 1 - done / args.k_annealing_fraction) if args.k_annealing_fraction else 0.0
            self.sae.annealed_k = min(config.d_sae, round(config.k + (args.k_start - config.k) * left))
        warmed = done / args.sparsity_warmup_fraction if args.sparsity_warmup_fraction else 1.0
        self.sae.sparsity_weight = min(1.0, warmed)

    def _update(self, output: SAEOutput) -> None:
        if self.args.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.args.max_grad_norm)
        self.sae.remove_parallel_gradient_()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.normalize_decoder_()
        if self._config.activation == "batchtopk":
            self.sae.update_threshold_(output.latents)
        elif self._config.activation == "jumprelu":
            self.sae.threshold.data.clamp_(min=0)
