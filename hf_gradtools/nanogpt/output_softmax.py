"""Probabilities of the next token by another function than softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .registry import variant


class OutputSoftmax(nn.Module):
    """A `LogitsProcessor` that makes softmax of its result the weights of `softmax_variant_output`, normalised.

    The variant's parameters are those it begins with: cross-entropy, which the model is trained by, has no use for
    them. A logit of -inf stays one.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.weighting = variant("softmax", config.softmax_variant_output)(config, 0, 1)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities `[B, W]` of logits `[B, W]`; rows whose weights are all zero keep their logits."""
        allowed = torch.isfinite(scores)[:, None, None, :]
        logits = scores.float()[:, None, None, :].masked_fill(~allowed, 0.0)
        weights = self.weighting(logits, allowed)[:, 0, 0]
        is_empty = weights.sum(-1, keepdim=True) == 0
        return torch.where(is_empty, scores, weights.log().to(scores.dtype)).log_softmax(-1)
