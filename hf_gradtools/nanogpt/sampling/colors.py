"""How sure a model was of each token that it wrote, as a number in [0, 1] and as a colour.

T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


__all__ = ["COLOR_MODES", "intensity_to_rgb", "token_intensities", "token_ranks"]

COLOR_MODES = ("softmax", "minmax", "rank")
RANK_LIMIT = 100


def token_intensities(logits: Tensor, ids: Tensor, mode: str = "softmax", rank_limit: int = RANK_LIMIT) -> Tensor:
    """How sure the model was of each token: 1 the surest, 0 the least sure.

    Args:
        logits (`Tensor`): `[T, V]`, of the step that chose each token.
        ids (`Tensor`): `[T]`, the tokens chosen.
        mode (`str`, defaults to `"softmax"`): `"softmax"` is the probability of the token; `"minmax"` its logit, from
            the lowest of the text (0) to the highest (1), all 1 where they are equal; `"rank"` falls from 1 for the
            likeliest token to 0 at `rank_limit` and beyond.
        rank_limit (`int`, defaults to 100): the rank, counted from 1, at which `"rank"` reaches 0; at most V.

    Returns:
        `Tensor`: `[T]`, float64.

    Raises:
        ValueError: for an unknown mode, or shapes that do not belong together.
    """
    _check(logits, ids)
    if mode == "softmax":
        return _chosen(logits.double().log_softmax(-1), ids).exp()
    if mode == "minmax":
        return _stretch(_chosen(logits.double(), ids))
    if mode == "rank":
        last = max(min(rank_limit, logits.shape[-1]), 2)
        return 1 - (token_ranks(logits, ids).clamp(max=last).double() - 1) / (last - 1)
    raise ValueError(f"mode={mode!r} is unknown; pass one of {', '.join(COLOR_MODES)}.")


def token_ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """Place of each token, `[T]`, among all of the vocabulary by logit; 1 is the likeliest, ties share the better."""
    _check(logits, ids)
    return (logits > _chosen(logits, ids)[:, None]).sum(-1) + 1


def intensity_to_rgb(intensity: float) -> tuple[int, int, int]:
    """Red (0) over brown to green (1)."""
    if not 0 <= intensity <= 1:
        raise ValueError(f"intensity={intensity} is outside [0, 1].")
    return round((1 - intensity) * 255), round(intensity * 255), 0


def _chosen(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[:, None]).squeeze(-1)


def _stretch(values: Tensor) -> Tensor:
    if len(values) == 0 or values.max() == values.min():
        return torch.ones_like(values)
    return (values - values.min()) / (values.max() - values.min())


def _check(logits: Tensor, ids: Tensor) -> None:
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"logits {list(logits.shape)} and ids {list(ids.shape)} must be [T, V] and [T].")
