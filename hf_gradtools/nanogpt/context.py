"""What the layers of one forward share: where tokens stand, which keys they see.

Shapes: B batch, S tokens of this forward, K keys with those of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Context:
    """What all layers of one forward share.

    Args:
        position_ids: `[B or 1, S]`.
        queries: `[S]`, indices of the queries in the sequence with its padding.
        token_mask: bool `[B, S]`, False at padding; None if there is none.
        rotations: head size -> cosines and sines; empty without rotary positions.
        masks: window -> (keys, allowed): `[K]` indices of the keys, and bool `[B or 1, 1, S, K]`, or None where
            the plain causal triangle is right.
        sdpa: the fused attention, or None if weights are to be computed openly.
    """

    position_ids: Tensor
    queries: Tensor
    token_mask: Tensor | None
    rotations: dict[int, tuple[Tensor, Tensor]]
    masks: dict[int | None, tuple[Tensor, Tensor | None]]
    sdpa: Callable[..., tuple[Tensor, Any]] | None


def padding_mask(attention_mask: Tensor, batch: int, length: int, *, holes: bool) -> Tensor | None:
    """The mask `[B, length]`, or None if nothing is padding.

    Args:
        attention_mask (`Tensor`): what the user passed.
        batch, length (`int`): B, and the number of tokens with those of the cache.
        holes (`bool`): whether padding between tokens is harmless.

    Raises:
        ValueError: it has another shape, or a hole where none may be.
    """
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; needed is [{batch}, {length}], 1 for each token "
            "of the cache and of the input that is not padding."
        )
    is_token = attention_mask.bool()
    if bool(is_token.all()):
        return None
    if not holes:
        starts = (is_token[:, 1:] & ~is_token[:, :-1]).sum(-1) + is_token[:, 0]
        if bool((starts > 1).any()):
            raise ValueError(
                "attention_mask has padding between the tokens of a row, which a window, FIRE and ssm would count as "
                "tokens. Pad on the left (tokenizer.padding_side='left') before more tokens follow; and pass generate "
                "an attention_mask if its pad_token_id occurs as a token."
            )
    return is_token


def explicit_mask(attention_mask: Tensor) -> Tensor:
    """A mask `[B or 1, 1, S, K]` as bools, True where a query may look.

    Raises:
        ValueError: its type leaves open which value means what.
    """
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if attention_mask.is_floating_point():
        allowed = attention_mask == 0
        if bool((allowed | (attention_mask <= torch.finfo(attention_mask.dtype).min / 2)).all()):
            return allowed
    raise ValueError(
        f"attention_mask of shape {list(attention_mask.shape)} and {attention_mask.dtype} is neither bools, True "
        "where a query may look, nor 0 there and the smallest number elsewhere. Pass bools."
    )


def counted_positions(is_token: Tensor, tokens: int) -> Tensor:
    """Position of each of the last tokens among those of its row that are not padding, `[B, tokens]`."""
    return (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def documents_of(position_ids: Tensor) -> Tensor | None:
    """Number of the document of each token `[B or 1, S]` in packed rows, whose positions restart; else None."""
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(restarts.any()):
        return None
    return nn.functional.pad(restarts.long().cumsum(-1), (1, 0))


def visible_keys(queries: Tensor, keys: Tensor, is_token: Tensor | None, window: int | None) -> Tensor:
    """Which keys a query sees: those up to itself, no more than `window`, none that is padding.

    Args:
        queries (`Tensor`): `[S]`, indices of the queries in the sequence.
        keys (`Tensor`): `[K]`, those of the keys.
        is_token (`Tensor`, *optional*): bool `[B, K]`, False at padding.
        window (`int`, *optional*): how many keys at most, itself included.

    Returns:
        `Tensor`: bool `[B or 1, 1, S, K]`.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    seen = seen[None, None]
    return seen if is_token is None else seen & is_token[:, None, None, :]


def layer_mask(
    window: int | None,
    sizes: tuple[int, int],
    queries: Tensor,
    is_token: Tensor | None,
    documents: Tensor | None,
    end: int,
) -> tuple[Tensor, Tensor | None]:
    """Keys `[K]` of the layers of one window, and what is visible; None where SDPA's causal triangle is that.

    Args:
        window (`int`, *optional*): the layers' window.
        sizes (`tuple`): K, and the index of the first key, of the layer's cache.
        queries (`Tensor`): `[S]`.
        is_token (`Tensor`, *optional*): bool `[B, tokens so far]`.
        documents (`Tensor`, *optional*): `[B or 1, S]`, of packed rows.
        end (`int`): tokens so far, those of this forward included. Keys past it are empty places of a static cache.
    """
    length, offset = sizes
    tokens = queries.shape[0]
    keys = torch.arange(length, device=queries.device) + offset
    fits = window is None or length <= window
    all_seen = length == tokens or (tokens == 1 and offset + length == end)
    if is_token is None and documents is None and fits and all_seen:
        return keys, None
    if is_token is not None:
        is_token = nn.functional.pad(is_token, (0, max(offset + length - end, 0)))[:, offset : offset + length]
    allowed = visible_keys(queries, keys, is_token, window)
    if documents is not None:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        allowed = allowed & nn.functional.pad(same, (0, length - tokens))
    return keys, allowed
