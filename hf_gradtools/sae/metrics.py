"""What autoencoders are worth: reconstruction, sparsity, feature densities, and the model's loss with them in place.

N tokens, D = d_in, F = d_sae. Sums run over the whole set, in float64: no ratio is a mean of batches' ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradtools.core.inference import evaluating
from hf_gradtools.sae.fitting import check_any, check_fit
from hf_gradtools.sae.loss_recovered import CrossEntropy, cross_entropy_recovered
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.shuffling import ActivationSource
from hf_gradtools.sae.store import ActivationStore
from hf_gradtools.sae.streaming import ModelActivations


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["SAEMetrics", "density_histogram", "evaluate", "evaluate_store"]

BINS_PER_DECADE = 4


@dataclass(frozen=True)
class SAEMetrics:
    """What one autoencoder is worth on N tokens.

    Args:
        hookpoint (`str`): where it reads.
        num_tokens (`int`): N.
        fvu (`float`, *optional*): ‖x − x̂‖² over ‖x − mean‖², both summed over all tokens; `None` if all x are equal.
        explained_variance (`float`, *optional*): 1 − variance of x − x̂ over variance of x: 1 − fvu, but for a constant
            offset that it forgives.
        cosine (`float`): between x and x̂, mean over tokens.
        l0 (`float`): active features of a token, mean.
        dead_fraction (`float`): features that no token activates.
        density (`list[float]`): `[F]`, share of tokens that activate each feature.
        density_edges (`list[float]`): bounds of the histogram's bins, log10 of the density.
        density_counts (`list[int]`): features in each bin; dead ones are in none.
        cross_entropy ([`~hf_gradtools.sae.loss_recovered.CrossEntropy`], *optional*): of the model with it in place.
    """

    hookpoint: str
    num_tokens: int
    fvu: float | None
    explained_variance: float | None
    cosine: float
    l0: float
    dead_fraction: float
    density: list[float]
    density_edges: list[float]
    density_counts: list[int]
    cross_entropy: CrossEntropy | None = None

    def to_dict(self, *, density: bool = True) -> dict[str, Any]:
        """JSON values; `density=False` leaves out the list of F densities, but not their histogram."""
        return {key: value for key, value in asdict(self).items() if density or key != "density"}


def evaluate(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    sequences: Tensor,
    *,
    batch_size: int = 8,
    skip_positions: int = 1,
    loss_sequences: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict[str, SAEMetrics]:
    """Measures the autoencoders of a model on sequences of tokens, all in the same passes.

    One pass up to the last hookpoint gives all but the cross-entropy, which costs 1 + 3 · hookpoints forwards more.

    Args:
        model (`PreTrainedModel`): a causal LM; runs in eval mode, without gradients.
        saes (`Mapping[str, SAE]`): by hookpoint.
        sequences (`Tensor`): `[sequences, S]` token ids without padding, see
            [`~hf_gradtools.sae.packing.token_blocks`].
        batch_size (`int`, defaults to 8): sequences of a forward.
        skip_positions (`int`, defaults to 1): first positions of each sequence (attention sinks) that are not measured
            and that the cross-entropy leaves as they are.
        loss_sequences (`int`, *optional*): sequences that the cross-entropy is measured on, the first ones; default
            all, 0 for no cross-entropy.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the hidden states.
        progress (`bool`, defaults to `True`): whether bars show.

    Returns:
        `dict[str, SAEMetrics]`: by hookpoint, in the order given.

    Raises:
        ValueError: if there is no autoencoder, one does not fit its hookpoint, or sequences do not fit the model.
    """
    if loss_sequences is not None and loss_sequences < 0:
        raise ValueError(f"loss_sequences={loss_sequences} is negative. Pass 0 for no cross-entropy, or None for all.")
    check_any(saes)
    source = ModelActivations(model, sequences, list(saes), batch_size, dtype, skip_positions)
    sums = _accumulate(source, saes, source.num_tokens, progress)
    results = {name: part.result(name) for name, part in sums.items()}
    if loss_sequences == 0:
        return results
    means = {name: part.x.mean for name, part in sums.items()}
    losses = cross_entropy_recovered(
        model,
        saes,
        sequences[:loss_sequences],
        means,
        batch_size=source.forward_size,
        skip_positions=skip_positions,
        progress=progress,
    )
    return {name: replace(result, cross_entropy=losses[name]) for name, result in results.items()}


def evaluate_store(
    source: ActivationStore | ActivationSource,
    saes: Mapping[str, SAE],
    *,
    max_tokens: int | None = None,
    progress: bool = True,
) -> dict[str, SAEMetrics]:
    """Measures autoencoders on stored activations: all that needs no model, so no cross-entropy.

    Args:
        source (`ActivationStore` or `ActivationSource`): a store, or some of its hookpoints.
        saes (`Mapping[str, SAE]`): by hookpoint.
        max_tokens (`int`, *optional*): how many tokens, the first ones; default all.
        progress (`bool`, defaults to `True`): whether a bar shows.

    Returns:
        `dict[str, SAEMetrics]`: by hookpoint, in the order given.

    Raises:
        ValueError: if there is no autoencoder, or one does not fit its hookpoint.
    """
    check_any(saes)
    if isinstance(source, ActivationStore):
        source = source.source(list(saes))
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}; need at least 1. Pass max_tokens=None for all.")
    num_tokens = source.num_tokens if max_tokens is None else min(max_tokens, source.num_tokens)
    return {name: part.result(name) for name, part in _accumulate(source, saes, num_tokens, progress).items()}


def density_histogram(density: np.ndarray, num_tokens: int) -> tuple[list[float], list[int]]:
    """How many features are how frequent, on a logarithmic scale.

    Args:
        density (`np.ndarray`): `[F]`, share of tokens that activate each feature.
        num_tokens (`int`): of how many tokens; the lowest bin holds what one of them gives.

    Returns:
        `tuple[list[float], list[int]]`: bounds of the bins as log10 of the density, four to a decade, and the features
        of each; dead ones are in none.
    """
    decades = max(1, math.ceil(math.log10(max(1, num_tokens))))
    edges = np.linspace(-decades, 0, decades * BINS_PER_DECADE + 1)
    alive = np.log10(density[density > 0])
    counts = np.histogram(alive.clip(edges[0], 0), edges)[0]
    return edges.tolist(), counts.tolist()


class _Spread:
    """Mean and total squared deviation of rows that come in pieces, without subtracting large sums."""

    def __init__(self) -> None:
        self.count, self.deviation = 0, 0.0
        self.mean = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Takes in `[n, D]` float64 rows."""
        mean = rows.mean(0)
        self.deviation += float((rows - mean).square().sum())
        if not self.count:
            self.count, self.mean = len(rows), mean
            return
        total = self.count + len(rows)
        shift = mean - self.mean
        self.deviation += float(shift.square().sum()) * self.count * len(rows) / total
        self.mean = self.mean + shift * (len(rows) / total)
        self.count = total


class _Sums:
    """What is summed up for one autoencoder."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.x, self.error = _Spread(), _Spread()
        self.squared_error = self.cosines = 0.0
        self.active = torch.zeros(sae.config.d_sae, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        if not len(x):  # a piece of outliers alone, say
            return
        x = x.to(self.sae.W_dec.device)
        latents = self.sae.encode_sparse(x)
        reconstruction = self.sae.decode(latents).double()
        x = x.double()
        error = x - reconstruction
        self.x.add(x)
        self.error.add(error)
        self.squared_error += float(error.square().sum())
        self.cosines += float(F.cosine_similarity(x, reconstruction, dim=1, eps=1e-30).sum())
        features = latents.indices[latents.values > 0]
        self.active += torch.bincount(features, minlength=len(self.active)).cpu()

    def result(self, hookpoint: str) -> SAEMetrics:
        spread, count = self.x.deviation, max(1, self.x.count)
        density = self.active.double().numpy() / count
        edges, counts = density_histogram(density, self.x.count)
        return SAEMetrics(
            hookpoint=hookpoint,
            num_tokens=self.x.count,
            fvu=self.squared_error / spread if spread else None,
            explained_variance=1 - self.error.deviation / spread if spread else None,
            cosine=self.cosines / count,
            l0=float(self.active.sum()) / count,
            dead_fraction=float((self.active == 0).double().mean()),
            density=density.tolist(),
            density_edges=edges,
            density_counts=counts,
        )


@torch.no_grad()
def _accumulate(
    source: ActivationSource, saes: Mapping[str, SAE], num_tokens: int, progress: bool
) -> dict[str, _Sums]:
    check_fit(saes, source)
    sums = {name: _Sums(sae) for name, sae in saes.items()}
    with ExitStack() as stack:
        stack.enter_context(evaluating(*saes.values()))
        bar = stack.enter_context(tqdm(total=num_tokens, desc="reconstruction", unit="tok", disable=not progress))
        for chunk in source.chunks(0, num_tokens):
            for name, part in sums.items():
                part.add(chunk[name])
            bar.update(len(next(iter(chunk.values()))))
    return sums
