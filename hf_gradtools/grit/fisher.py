"""Running second moments of each layer's rank space: `Σ_a = E[a aᵀ]` and `Σ_g = E[b bᵀ]`.

Shape letters: T tokens, R rank. Sums of a step are kept apart until the step is taken; only then do they enter the
average, so that a step which the loss scaler skips leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradtools.core.distributed import all_reduce_sum, world_size


class RankFisher:
    """Factors of one layer, `[2, R, R]`: first of the activations, then of the gradients.

    At least float32 whatever the dtype of the model: in half precision the gradients' factor is exactly zero.

    Args:
        like: the layer's A, `[R, I]`.

    Attributes:
        sums: `Σ a aᵀ` and `Σ b bᵀ` over the tokens of this step so far.
        tokens: how many, a scalar tensor (reading it would wait for the device).
        average: the running average, not yet corrected for its start.
        weight: what the averaged sums weigh together; `average / weight` is the estimate.
        samples: tokens averaged over.
    """

    def __init__(self, like: Tensor):
        rank, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
        self.sums = torch.zeros(2, rank, rank, device=like.device, dtype=dtype)
        self.tokens = torch.zeros((), device=like.device, dtype=dtype)
        self.average = torch.zeros_like(self.sums)
        self.weight = 0.0
        self.samples = 0.0

    def add(self, activations: Tensor, grads: Tensor, mask: Tensor | None, loss_divisor: Tensor | float) -> None:
        """Counts tokens: activations `[..., R]`, gradients `[..., R]` of the loss, `mask` `[T]` of the real ones."""
        a, b = (x.flatten(0, -2).to(self.sums.dtype) for x in (activations, grads))
        b = b * (loss_divisor.to(b.device) if isinstance(loss_divisor, Tensor) else loss_divisor)
        if mask is not None:
            gone = ~mask.to(a.device)[:, None]  # filled, not multiplied: what stands at padding may be NaN
            a, b = a.masked_fill(gone, 0), b.masked_fill(gone, 0)
        self.sums[0].addmm_(a.mT, a)
        self.sums[1].addmm_(b.mT, b)
        self.tokens += len(a) if mask is None else mask.sum()

    def discard(self) -> None:
        self.sums.zero_()
        self.tokens.zero_()

    @property
    def factors(self) -> Tensor:
        """The estimate of both factors, `[2, R, R]`."""
        return self.average / self.weight if self.weight else self.average

    def restore(self, average: Tensor, weight: float, samples: float) -> None:
        """Takes over what was saved, of whatever rank."""
        self.average = average.to(self.average)
        self.weight, self.samples = weight, samples
        self.sums, self.tokens = torch.zeros_like(self.average), torch.zeros_like(self.tokens)

    def transform(self, activation_map: Tensor, gradient_map: Tensor) -> None:
        """Follows a change of the rank space: `a' = activation_map @ a`, `b' = gradient_map @ b`, both `[K, R]`."""
        maps = torch.stack([activation_map, gradient_map])
        self.average = (maps @ self.average.double() @ maps.mT).to(self.average.dtype)
        self.sums = torch.zeros_like(self.average)
        self.tokens = torch.zeros_like(self.tokens)


def fold(fishers: Sequence[RankFisher], ema_decay: float | None, grad_scale: float = 1.0) -> int:
    """Moves the sums of a step, over all ranks, into the averages.

    Args:
        fishers: of all layers, in the same order on every rank.
        ema_decay: of an exponential moving average; None for the mean over everything seen.
        grad_scale: what all gradients of the step are still multiplied with, such as a loss scaler's factor.

    Returns:
        how many layers had non-finite sums, which are dropped.
    """
    if world_size() > 1:
        _sum_over_ranks(fishers)
    tokens, finite = _read(fishers)
    live = [i for i, seen in enumerate(tokens) if seen and finite[i]]
    if grad_scale != 1:
        for i in live:
            fishers[i].sums[1] /= grad_scale**2
    if live:
        keep = 1.0 if ema_decay is None else ema_decay
        gains = [tokens[i] if ema_decay is None else 1 - ema_decay for i in live]
        averages = [fishers[i].average for i in live]
        torch._foreach_mul_(averages, keep)
        shares = [gain / tokens[i] for gain, i in zip(gains, live, strict=True)]
        torch._foreach_add_(averages, torch._foreach_mul([fishers[i].sums for i in live], shares))
        for gain, i in zip(gains, live, strict=True):
            fishers[i].weight = fishers[i].weight * keep + gain
            fishers[i].samples += tokens[i]
    for fisher in fishers:
        fisher.discard()
    return finite.count(False)


def _read(fishers: Sequence[RankFisher]) -> tuple[list[float], list[bool]]:
    """Token counts and whether the sums are finite; once per step and device, the host waits for these."""
    tokens, finite = [0.0] * len(fishers), [True] * len(fishers)
    for device in {fisher.sums.device for fisher in fishers}:
        here = [i for i, fisher in enumerate(fishers) if fisher.sums.device == device]
        values = torch.stack([torch.stack([fishers[i].tokens, fishers[i].sums.sum()]) for i in here])
        for i, (count, total) in zip(here, values.tolist(), strict=True):
            tokens[i], finite[i] = count, math.isfinite(total)
    return tokens, finite


def _sum_over_ranks(fishers: Sequence[RankFisher]) -> None:
    """One collective for everything."""
    parts = [part for fisher in fishers for part in (fisher.sums, fisher.tokens)]
    flat = torch.cat([part.flatten() for part in parts])
    all_reduce_sum([flat])
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(values.view_as(part))
