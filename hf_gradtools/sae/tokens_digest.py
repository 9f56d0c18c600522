"""Tells sequences of token ids apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


__all__ = ["sequences_digest"]


def sequences_digest(sequences: Tensor) -> str:
    """A hash of all token ids and their shape.

    Args:
        sequences (`Tensor`): `[sequences, context_length]` integers.
    """
    ids = sequences.to("cpu", torch.int32).contiguous()
    digest = hashlib.blake2b(f"{tuple(ids.shape)}".encode(), digest_size=16)
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()
