"""Which sample every token of a batch belongs to, and sums of token values over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleLayout:
    """How the samples of a (micro-)batch lie in its tensors.

    Args:
        rows: leading dimension of the model's inputs.
        seq_lengths: sequence lengths in the batch; an activation with `rows * length` leading entries is read as
            flattened tokens (mixture-of-experts layers see such).
        segments: `[rows, S]` index of the sample that each token belongs to when several samples are packed into a
            row; None when every row is one sample.
        num_samples: number of samples; equals `rows` unless packed.
    """

    rows: int
    seq_lengths: tuple[int, ...] = ()
    segments: Tensor | None = None
    num_samples: int = 0

    def __post_init__(self) -> None:
        if self.segments is None:
            object.__setattr__(self, "num_samples", self.rows)

    def by_row(self, values: Tensor, axis: int = 0) -> Tensor:
        """Views flattened tokens `[rows * S, ...]` at `axis` as `[rows, S, ...]`; rows stay as they are.

        Raises:
            ValueError: the leading entries are neither rows nor tokens, so nobody can tell whose they are.
        """
        leading = values.shape[axis]
        if leading == self.rows:
            return values
        if self.rows == 1:  # whatever the order, it is all one row's
            return values.unsqueeze(axis)
        for length in self.seq_lengths:
            if leading == self.rows * length:
                return values.reshape(*values.shape[:axis], self.rows, length, *values.shape[axis + 1 :])
        raise ValueError(
            f"values with {leading} leading entries cannot be attributed to {self.rows} rows of lengths "
            f"{list(self.seq_lengths)}: the layer mixes or reorders samples"
        )

    def sum_samples(self, values: Tensor) -> Tensor:
        """Sums `[K, rows, ...]` (or `[K, rows * S, ...]`) over all but target and sample: `[K, num_samples]`."""
        values = self.by_row(values, axis=1)
        if self.segments is None:
            return values.flatten(2).sum(-1) if values.ndim > 2 else values
        tokens = self.token_values(values)
        summed = tokens.new_zeros(len(tokens), self.num_samples)
        return summed.index_add_(1, self.segments.reshape(-1), tokens.flatten(1))

    def outer_sums(self, left: Tensor, right: Tensor) -> Tensor:
        """`Σ_t left_t right_tᵀ` over the tokens of each sample: `[num_samples, A, B]`.

        Args:
            left: `[rows, ..., A]` or `[rows * S, A]`.
            right: `[rows, ..., B]` or `[rows * S, B]`.
        """
        left, right = (self.by_row(x) for x in (left, right))
        if self.segments is None:
            left, right = (x.reshape(self.rows, -1, x.shape[-1]) for x in (left, right))
            return torch.bmm(left.mT, right)
        lengths = torch.bincount(self.segments.flatten(), minlength=self.num_samples).tolist()
        pairs = zip(left.flatten(0, -2).split(lengths), right.flatten(0, -2).split(lengths), strict=True)
        return torch.stack([a.mT @ b for a, b in pairs])

    def token_values(self, values: Tensor) -> Tensor:
        """Sums `[K, rows, S, ...]` over the trailing axes: one number per token, `[K, rows, S]`.

        Raises:
            ValueError: the layer works on whole rows, so its value has no share per token.
        """
        values = self.by_row(values, axis=1)
        if values.ndim < 3 or values.shape[2] not in self.seq_lengths:
            raise ValueError(
                f"values of shape {list(values.shape[1:])} have no token axis of the lengths {list(self.seq_lengths)}"
            )
        return values.flatten(3).sum(-1) if values.ndim > 3 else values

    def sample_mask(self, like: Tensor, sample: int) -> Tensor:
        """True where an entry of the activation `like` (`[rows, ...]` or `[rows * S, ...]`) belongs to `sample`."""
        rows = self.by_row(like)
        slots = torch.arange(self.rows, device=like.device) if self.segments is None else self.segments
        mask = (slots == sample).view(*slots.shape, *[1] * (rows.ndim - slots.ndim))
        return mask.expand(rows.shape).reshape(like.shape)
