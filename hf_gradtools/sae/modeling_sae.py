"""A sparse autoencoder of hidden states."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hf_gradtools.sae.activations import ENCODERS, Encoded
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.losses import (
    auxk_loss,
    gate_loss,
    l1_penalty,
    mean_squared_error,
    mean_variance,
    prefix_reconstructions,
)
from hf_gradtools.sae.sparse import SparseLatents, decode


if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SAE", "SAEOutput"]


@dataclass
class SAEOutput(ModelOutput):
    """What a sparse autoencoder gives for `x`, `[..., D]`, of N tokens.

    Args:
        loss (`Tensor`): what training minimises: `mse` (of each prefix's reconstruction, if there are several), plus
            the penalties times their coefficients.
        reconstruction (`Tensor`): of the shape of `x`.
        latents ([`SparseLatents`]): of the N tokens.
        mse (`Tensor`): mean squared error over tokens and dimensions.
        sparsity (`Tensor`): the penalty of `config.sparsity_penalty`, before its coefficient.
        auxk (`Tensor`): the loss of dead features, before its coefficient.
        fvu (`Tensor`): fraction of variance unexplained, without gradient.
        l0 (`Tensor`): mean number of active features, without gradient.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    latents: SparseLatents | None = None
    mse: Tensor | None = None
    sparsity: Tensor | None = None
    auxk: Tensor | None = None
    fvu: Tensor | None = None
    l0: Tensor | None = None


class SAE(nn.Module):
    """A sparse autoencoder: `latents = activation((x - b_dec) @ W_enc.T + b_enc)`, `latents @ W_dec + b_dec`.

    A feature's encoder and decoder are rows of `W_enc` and `W_dec`, both `[F, D]`. It computes in its parameters'
    type, or in that of `torch.autocast` where that is on.

    Args:
        config ([`SAEConfig`]): what it is.
        seed (`int`, *optional*): of the weights; by default torch's global generator draws them.

    Attributes:
        threshold: `[F]`, or `[1]` if shared; of `"jumprelu"` (a parameter) and `"batchtopk"` (learned while training).
        r_mag, b_mag: `[F]`, of `"gated"`.
        annealed_k (`int`, *optional*): active features of a token for now, instead of `config.k`: training lowers it.
        sparsity_weight (`float`): factor of `config.sparsity_coefficient` for now: training raises it to one.
    """

    def __init__(self, config: SAEConfig, seed: int | None = None):
        super().__init__()
        self.config = config
        self.annealed_k: int | None = None
        self.sparsity_weight = 1.0
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(config.d_sae, config.d_in, generator=generator), dim=1)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(
                torch.full((1 if config.shared_threshold else config.d_sae,), config.threshold)
            )
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(config.d_sae))
        elif config.activation == "gated":
            self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
            self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def forward(self, x: Tensor, dead: Tensor | None = None) -> SAEOutput:
        """Encodes and decodes.

        Args:
            x (`Tensor`): `[..., D]` hidden states.
            dead (`Tensor`, *optional*): `[F]` bool, features that have not been active for long; adds their loss.

        Raises:
            ValueError: `x` has another width than the autoencoder, or no tokens.
        """
        if x.numel() == 0 and x.shape[-1:] == (self.config.d_in,):
            raise ValueError(
                f"x has shape {list(x.shape)}, no tokens, so that there is no mean loss. Use sae.encode(x)."
            )
        rows, weights = self._rows(x), self._weights(x.device)
        centred = self._centred(rows, weights)
        encoded = ENCODERS[self.config.activation](centred, weights, self._config_now(), self.training)
        reconstructions = list(self._reconstructions(encoded.latents, weights))
        errors = [mean_squared_error(reconstruction, rows) for reconstruction in reconstructions]
        reconstruction = reconstructions[-1]
        sparsity = self._sparsity(encoded, weights)
        auxk = errors[-1].new_zeros(())
        if dead is not None and self.config.auxk_coefficient and bool(dead.any()):
            k = self.config.auxk or max(1, self.config.d_in // 2)
            auxk = auxk_loss(rows - reconstruction, centred, weights, dead, k)
        loss = torch.stack(errors).mean() + self.config.auxk_coefficient * auxk
        if self.config.sparsity_penalty != "none":
            loss = loss + self.sparsity_weight * self.config.sparsity_coefficient * sparsity
        if encoded.gates is not None:
            loss = loss + gate_loss(rows, encoded.gates, weights["W_dec"], weights["b_dec"])
        return SAEOutput(
            loss=loss,
            reconstruction=reconstruction.view(x.shape),
            latents=encoded.latents,
            mse=errors[-1],
            sparsity=sparsity,
            auxk=auxk,
            fvu=errors[-1].detach() / mean_variance(centred.detach()),
            l0=(encoded.latents.values.detach() > 0).sum() / max(1, len(rows)),
        )

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The latents of hidden states `[..., D]`, token by token; those of value zero may be among them."""
        rows, weights = self._rows(x), self._weights(x.device)
        centred = self._centred(rows, weights)
        return ENCODERS[self.config.activation](centred, weights, self._config_now(), self.training).latents

    def encode(self, x: Tensor) -> Tensor:
        """The latents of hidden states `[..., D]`: `[..., F]`."""
        return self.encode_sparse(x).dense().view(*x.shape[:-1], self.config.d_sae)

    def decode(self, latents: Tensor | SparseLatents) -> Tensor:
        """Hidden states of latents: `[..., D]` of `[..., F]`, or `[N, D]` of [`SparseLatents`] of N tokens."""
        weights = self._weights(self.W_dec.device)
        if isinstance(latents, SparseLatents):
            values = latents.values.to(weights["W_dec"].dtype)
            return decode(values, weights["W_dec"], latents.pattern) + weights["b_dec"]
        return latents.to(weights["W_dec"].dtype) @ weights["W_dec"] + weights["b_dec"]

    # ---- on disk and on the Hub

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """Writes `<save_directory>/<hookpoint>/cfg.json` and `sae_weights.safetensors`, which SAELens loads as well.

        Without a hookpoint they lie in `save_directory` itself.

        Returns:
            `Path`: the folder of the two files.
        """
        from hf_gradtools.sae.saving import save

        return save(self, save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], hookpoint: str | None = None, **download: Any
    ) -> Self:
        """Loads one autoencoder, saved here, by SAELens or by sparsify, in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or a Hub id.
            hookpoint (`str`, *optional*): which of several, such as `"layers.5"`.
            **download: `revision`, `token`, `cache_dir`.

        Raises:
            ValueError: there is no such autoencoder, or weights are missing, left over or of the wrong shape.
        """
        from hf_gradtools.sae.saving import load

        return load(cls, pretrained_model_name_or_path, hookpoint, **download)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
        """Uploads it, with a card, beside other hookpoints of a repository; returns the commit's address."""
        from hf_gradtools.sae.saving import push_many

        return push_many([self], repo_id, private=private, token=token)

    # ---- what training does to it

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Gives every feature's decoder row length one."""
        self.W_dec.div_(
            torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        )

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Takes out of `W_dec`'s gradient what would only change the rows' length."""
        if self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> None:
        """Turns an autoencoder of `scale * x` into the equal one of `x`; decoder rows keep their length.

        Every activation commutes with a positive factor, so biases and thresholds are divided by it, and latents come
        out smaller by it.
        """
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} must be positive and finite.")
        for name in ("b_enc", "b_dec", "b_mag", "threshold"):
            if (tensor := getattr(self, name, None)) is not None:
                tensor.div_(scale)

    @torch.no_grad()
    def update_threshold_(self, latents: SparseLatents, decay: float = 0.99) -> None:
        """Lets `"batchtopk"`'s threshold follow the smallest value that a batch kept."""
        active = latents.values[latents.values > 0]
        if active.numel():
            smallest = active.min().to(self.threshold.dtype)
            is_first = not bool(self.threshold.any())
            self.threshold.lerp_(smallest.expand_as(self.threshold), 1.0 if is_first else 1 - decay)

    # ---- parts

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.config.d_in,):
            raise ValueError(
                f"x has shape {list(x.shape)}; this SAE needs width d_in={self.config.d_in}"
                + (f", the hidden states at {self.config.hookpoint!r}" if self.config.hookpoint else "")
                + (f" of {self.config.model_name}." if self.config.model_name else ".")
            )
        return x.reshape(-1, self.config.d_in).to(self._dtype(x.device))

    def _centred(self, rows: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Tokens less `b_dec`, whose gradient goes through `b_enc` where it can: `[F]` numbers instead of `[N, D]`."""
        if not self.config.apply_b_dec_to_input:
            return rows
        b_dec = weights["b_dec"]
        if self.config.activation == "gated" or not torch.is_grad_enabled():  # gated adds biases of its own
            return rows - b_dec
        weights["b_enc"] = weights["b_enc"] - weights["W_enc"].detach() @ (b_dec - b_dec.detach())  # minus zero
        return rows - b_dec.detach()

    def _config_now(self) -> SAEConfig:
        return self.config if self.annealed_k is None else replace(self.config, k=self.annealed_k)

    def _dtype(self, device: torch.device) -> torch.dtype:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.W_enc.dtype

    def _weights(self, device: torch.device) -> dict[str, Tensor]:
        """All parameters and thresholds, in the type to compute in."""
        dtype = self._dtype(device)
        return {name: tensor.to(dtype) for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def _reconstructions(self, latents: SparseLatents, weights: dict[str, Tensor]) -> Iterator[Tensor]:
        if self.config.matryoshka_widths:
            yield from prefix_reconstructions(
                latents, weights["W_dec"], weights["b_dec"], self.config.matryoshka_widths
            )
        else:
            yield decode(latents.values, weights["W_dec"], latents.pattern) + weights["b_dec"]

    def _sparsity(self, encoded: Encoded, weights: dict[str, Tensor]) -> Tensor:
        if self.config.sparsity_penalty == "l0" and encoded.l0 is not None:
            return encoded.l0
        if self.config.sparsity_penalty == "l1":
            return l1_penalty(encoded.gates or encoded.latents, weights["W_dec"])
        values = encoded.latents.values
        return values.new_zeros((), dtype=torch.promote_types(values.dtype, torch.float32))

    def extra_repr(self) -> str:
        config = self.config
        width = f"d_in={config.d_in}, d_sae={config.d_sae}, activation={config.activation!r}"
        return f"{width}, hookpoint={config.hookpoint!r}"
