"""A part of the tokens of a source, so that some are kept from training."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_gradtools.sae.shuffling import ActivationSource


__all__ = ["PartOfSource", "hold_out_tokens"]


class PartOfSource:
    """The tokens of a source from `start` to `end`, as an [`ActivationSource`]."""

    def __init__(self, source: ActivationSource, start: int, end: int):
        self.source, self.start, self.num_tokens = source, start, end - start
        self.dtype: torch.dtype = source.dtype

    @property
    def hookpoints(self) -> list[str]:
        """Those that chunks have."""
        return self.source.hookpoints

    @hookpoints.setter
    def hookpoints(self, names: list[str]) -> None:
        self.source = copy.copy(self.source)
        self.source.hookpoints = names

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return self.source.d_in(hookpoint)

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The tokens from `start` to `end` of this part."""
        end = self.num_tokens if end is None else end
        if not 0 <= start <= end <= self.num_tokens:
            raise ValueError(f"start={start}, end={end} are not within the {self.num_tokens} tokens in order.")
        return self.source.chunks(self.start + start, self.start + end)


def hold_out_tokens(source: ActivationSource, share: float) -> tuple[ActivationSource, ActivationSource | None]:
    """Keeps the last tokens of a source from training; its documents were shuffled when they were packed.

    Args:
        source ([`ActivationSource`]): all tokens.
        share (`float`): of them; 0 keeps none.

    Returns:
        `tuple`: the source to train on, and the one to evaluate on or `None`.

    Raises:
        ValueError: if nothing would be left of one of them.
    """
    if share == 0:
        return source, None
    count = round(share * source.num_tokens)
    if not 0 < count < source.num_tokens:
        raise ValueError(
            f"eval_share={share:g} holds out {count} of {source.num_tokens} tokens; training and evaluation need at "
            "least 1 each. Pass more text, or eval_share=0."
        )
    first = source.num_tokens - count
    return PartOfSource(source, 0, first), PartOfSource(source, first, source.num_tokens)
