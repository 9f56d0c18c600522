"""Rows of tokens as padded batches of any causal LM.

Legend: B rows of a batch, S their padded length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["batches_by_length", "check_lengths", "entropies", "forward_options", "pad_token_of", "padded"]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar lengths, the longest first: what does not fit in memory fails at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no number of rows; need at least 1. Pass batch_size=32.")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    side: Literal["left", "right"],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, both `[B, S]`."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r} is none of 'left', 'right'. Pass one of them.")
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad(ids, batch_first=True, padding_value=pad_token_id, padding_side=side), mask


def forward_options(model: PreTrainedModel, attention_mask: Tensor, keep: int | None = None) -> dict[str, Any]:
    """What `model.forward` needs beside `input_ids` to see the same text under any padding.

    Args:
        model (`PreTrainedModel`): a causal LM.
        attention_mask (`Tensor`): `[B, S]`.
        keep (`int`, *optional*): logits are needed at so many last positions only; a model that cannot leave the
            others out returns all, so take the last ones of what comes back.
    """
    known = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in known:
        options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    if keep is not None and "logits_to_keep" in known:
        options["logits_to_keep"] = keep
    return options


def entropies(logprobs: Tensor) -> Tensor:
    """Of distributions over the last dimension, in nats; tokens of probability 0 add nothing."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def pad_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with; it is masked, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def check_lengths(model: PreTrainedModel, rows: Sequence[Sequence[int]], more_tokens: int = 0) -> None:
    """ValueError if a row, with `more_tokens` to come, exceeds the positions that the model has."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if limit is not None and len(row) + more_tokens > limit:
            raise ValueError(
                f"text {number} has {len(row)} tokens{f' and {more_tokens} to come' if more_tokens else ''}; "
                f"the model has {limit} positions. Leave it out, or shorten it."
            )
