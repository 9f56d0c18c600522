"""What the registered softmax variants make of the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradtools.nanogpt.components import VARIANTS
from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig


__all__ = ["softmax_weights"]


def softmax_weights(
    scores: Tensor,
    variants: Sequence[str] | None = None,
    config: NanoGPTConfig | None = None,
    allowed: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weights of one row of attention scores under each variant, with the parameters that it begins with.

    Args:
        scores (`Tensor`): `[K]`, of one query with each key, after scaling.
        variants (`Sequence[str]`, *optional*): names; default all that are registered.
        config (`NanoGPTConfig`, *optional*): options of the variants.
        allowed (`Tensor`, *optional*): `[K]` bool, which keys the query sees; default all.

    Returns:
        `dict[str, Tensor]`: `[K]`, of the type of `scores`, by name; 0 where not allowed.

    Raises:
        ValueError: a name is not registered, or the scores are no row.
    """
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores {list(scores.shape)} must be one row, [K], of at least one score.")
    known = VARIANTS["softmax"]
    names = sorted(known) if variants is None else list(variants)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"variants={unknown} are unknown; choose from {', '.join(sorted(known))}.")
    config = NanoGPTConfig(n_layer=1) if config is None else config
    seen = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed
    return {name: _weights(known[name], config, scores, seen) for name in names}


@torch.no_grad()
def _weights(variant: Any, config: NanoGPTConfig, scores: Tensor, allowed: Tensor) -> Tensor:
    weighting = variant(config, 0).to(scores.dtype).eval()
    weights: Tensor = weighting(scores[None, None, None], allowed[None, None, None])[0, 0, 0]
    return weights
