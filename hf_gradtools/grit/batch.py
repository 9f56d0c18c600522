"""What a forward pass says about its tokens: which of them are real, and by what number the loss was divided."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradtools.core.distributed import world_size


logger = logging.getLogger(__name__)

# Projections of the encoder's output, in a decoder: keys and values of cross-attention.
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|crossattention).*\b(k|v|k_proj|v_proj|key|value)$"
)


@dataclass(frozen=True)
class Batch:
    """One training forward.

    Attributes:
        mask: real tokens `[N, S]` of the encoder or the only stack; None: all are.
        decoder_mask: of a decoder beside an encoder.
        loss_divisor: the loss is a sum over tokens divided by this, a number or a scalar tensor. Multiplying
            gradients with it gives those of the sum, whatever the batch size, accumulation and number of ranks.
    """

    mask: Tensor | None
    decoder_mask: Tensor | None
    loss_divisor: Tensor | float

    @classmethod
    def of(cls, inputs: Mapping[str, Any], is_encoder_decoder: bool, accumulation_steps: int) -> Batch:
        """Reads the keyword arguments of a model's forward."""
        mask, decoder_mask, labels = (inputs.get(k) for k in ("attention_mask", "decoder_attention_mask", "labels"))
        if is_encoder_decoder and decoder_mask is None and isinstance(labels, Tensor):
            # Decoder inputs are the labels shifted right: position t is real if label t-1 is, and the first always.
            decoder_mask = torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], 1)
        return cls(
            _padding(mask),
            _padding(decoder_mask),
            _loss_divisor(inputs, labels, is_encoder_decoder, accumulation_steps),
        )

    def rows(self, tokens: Tensor, reads_encoder: bool) -> Tensor | None:
        """The mask of `tokens` `[N, S, R]` (or `[N·S, R]`) as `[N·S]`, None if all of them count.

        Args:
            tokens: what a layer computed.
            reads_encoder: it works on the encoder's tokens (or there is no decoder beside one).
        """
        mask = self.mask if reads_encoder else self.decoder_mask
        if mask is None:
            return None
        if tokens.shape[:-1] == mask.shape or tokens.shape[:-1] == (mask.numel(),):
            return mask.flatten()
        logger.warning(
            "a layer's activations of shape %s do not follow the attention mask of shape %s; all of their rows are "
            "counted as tokens", list(tokens.shape), list(mask.shape),
        )  # fmt: skip
        return None


def reads_encoder(name: str, model: nn.Module) -> bool:
    """Whether the layer `name` of `model` sees the tokens of `attention_mask`, rather than a decoder's."""
    if not is_encoder_decoder(model):
        return True
    return not re.search(r"(^|\.)decoder\.", name) or CROSS_ATTENTION.search(name) is not None


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _padding(mask: Any) -> Tensor | None:
    """A 2-D mask with something masked, as booleans; packed rows bring none, and other shapes are no padding masks."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def _loss_divisor(
    inputs: Mapping[str, Any], labels: Any, is_encoder_decoder: bool, accumulation_steps: int
) -> Tensor | float:
    """Trainer hands the label tokens of all micro-batches and ranks to models that divide by them, and multiplies by
    the ranks; other losses are means over a micro-batch, divided by the number of micro-batches."""
    total = inputs.get("num_items_in_batch")
    if total is not None:
        return total / world_size()
    if not isinstance(labels, Tensor):
        return float(accumulation_steps)
    counted = labels if is_encoder_decoder or labels.ndim < 2 else labels[..., 1:]
    return (counted != -100).sum().clamp(min=1) * accumulation_steps
