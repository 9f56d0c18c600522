"""Ids as they come, with padding anywhere, and as the model wants them."""

import torch
from torch import Tensor

from .losses import IGNORE_INDEX


def check_ids(name: str, ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """ValueError if ids are no batch of rows, or a mask is not of their shape; TypeError if they are no tensor."""
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{name} is a {type(ids).__name__}; pass a tensor [rows, tokens], as tokenizers return with 'pt'."
        )
    if ids.dim() != 2:
        raise ValueError(f"{name} has the shape {tuple(ids.shape)}; it must be [rows, tokens]. Pass {name}[None].")
    if attention_mask is not None and attention_mask.shape != ids.shape:
        raise ValueError(f"the mask of {name} has the shape {tuple(attention_mask.shape)}, not {tuple(ids.shape)}.")


def packed_right(ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows that begin with their tokens, as long as the longest, and their labels: −100 at padding.

    In a causal model tokens never see the padding after them, so that no mask is needed, and each row comes out as it
    would alone.

    Args:
        ids: `[B, S]`.
        attention_mask: `[B, S]`, 0 at padding, anywhere.

    Raises:
        ValueError: a row has no tokens.
    """
    if attention_mask is None:
        if ids.shape[1] == 0:
            raise ValueError("the contexts have no tokens. Leave the write out, or pass some.")
        return ids, ids
    is_token = attention_mask != 0
    lengths = is_token.sum(1)
    if not bool(lengths.all()):
        empty = int((lengths == 0).nonzero()[0])
        raise ValueError(f"context {empty} has no tokens, only padding. Leave it out of the batch.")
    order = torch.argsort(~is_token, dim=1, stable=True)[:, : int(lengths.max())]
    ids, is_token = ids.gather(1, order), is_token.gather(1, order)
    return ids, ids.masked_fill(~is_token, IGNORE_INDEX)


def query_positions(attention_mask: Tensor | None, read: int, tokens: int, device: torch.device) -> Tensor:
    """Positions `[N or 1, tokens]` of the last tokens of a query, of which some were read before.

    Args:
        attention_mask: `[N, read + tokens]`, 0 at padding, which does not count.
        read: tokens in the cache.
        tokens: tokens to read now.
    """
    if attention_mask is None:
        return torch.arange(read, read + tokens, device=device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]


def padding_first(attention_mask: Tensor, n_prefix: int) -> Tensor:
    """Where the entries of `[prefix, query]` go so that padding on the left stands before the prefix.

    Windows, convolutions and states count slots: with padding in between, the memory would be further away.

    Args:
        attention_mask: `[N, Q]`, of the query.
        n_prefix: P, positions before it.

    Returns:
        `[N, P + Q]`, for `gather`.
    """
    padding = (attention_mask != 0).int().argmax(1, keepdim=True)  # before the first token
    places = torch.arange(n_prefix + attention_mask.shape[1], device=attention_mask.device)[None]
    order = torch.where(places < padding, places + n_prefix, places - padding)
    return torch.where(places < padding + n_prefix, order, places)
