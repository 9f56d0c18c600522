"""What a forward pass says about its tokens: which of them are real, and by what number the loss was divided."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradtools.core.distributed import all_reduce_sum, world_size


logger = logging.getLogger(__name__)

# Projections of the encoder's output, in a decoder: keys and values of cross-attention.
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|crossattention).*\b(k|v|k_proj|v_proj|key|value)$"
)
_warned: set[str] = set()  # layers


@dataclass(frozen=True)
class Batch:
    """One training forward.

    Attributes:
        mask: real tokens `[N, S]` of the encoder or the only stack; None: all are.
        decoder_mask: of a decoder beside an encoder.
        loss_divisor: the loss is a sum over tokens divided by this, a number or a scalar tensor. Multiplying
            gradients with it gives those of the sum, whatever the batch size, accumulation and number of ranks.
        shared_labels: label tokens of the step so far, where the loss is divided by their number outside the model,
            once it is known; `loss_divisor` is 1 then.
    """

    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    loss_divisor: Tensor | float = 1.0
    shared_labels: Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], model: nn.Module, accumulation_steps: int, after: Batch | None) -> Batch:
        """Reads the keyword arguments of a model's forward.

        Args:
            inputs: they.
            model: whose forward it is.
            accumulation_steps: micro-batches of a step.
            after: the micro-batch before it in the same step.
        """
        mask, decoder_mask, labels = (inputs.get(k) for k in ("attention_mask", "decoder_attention_mask", "labels"))
        if is_encoder_decoder(model) and decoder_mask is None and isinstance(labels, Tensor):
            # Decoder inputs are the labels shifted right: position t is real if label t-1 is, and the first always.
            decoder_mask = torch.cat([torch.ones_like(labels[:, :1], dtype=torch.bool), labels[:, :-1] != -100], 1)
        masks = _padding(mask), _padding(decoder_mask)
        total = inputs.get("num_items_in_batch")
        if total is not None:
            # Trainer counts the labels of all micro-batches and ranks, and multiplies the loss by the ranks.
            return cls(*masks, total / world_size())
        if not isinstance(labels, Tensor):
            return cls(*masks, float(accumulation_steps))
        count = _label_count(labels, model)
        if inputs.get("fused_lm_head"):  # TRL's, which divides by the number of labels in its trainer
            before = after.shared_labels if after is not None and after.shared_labels is not None else 0
            return cls(*masks, 1.0, count + before)
        return cls(*masks, count.clamp(min=1) * accumulation_steps)

    def shared_divisor(self) -> float:
        """What all gradients of the step are still divided by; a collective where `shared_labels` is known."""
        if self.shared_labels is None:
            return 1.0
        total = self.shared_labels.float()
        all_reduce_sum([total])
        return max(float(total), 1.0) / world_size()

    def rows(self, layer: str, tokens: Tensor, sees_encoder: bool) -> Tensor | None:
        """The mask of `tokens` `[N, S, R]` (or `[N·S, R]`) as `[N·S]`, None if all of them count.

        Args:
            layer: name of the layer that computed them.
            tokens: they.
            sees_encoder: they are the encoder's (or there is no decoder beside one).
        """
        mask = self.mask if sees_encoder else self.decoder_mask
        if mask is None:
            return None
        if tokens.shape[:-1] == mask.shape or tokens.shape[:-1] == (mask.numel(),):
            return mask.flatten()
        if layer not in _warned:
            _warned.add(layer)
            logger.warning(
                "activations of %s have the shape %s, which does not follow the attention mask of shape %s: all rows "
                "count as tokens", layer, list(tokens.shape), list(mask.shape),
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


def _label_count(labels: Tensor, model: nn.Module) -> Tensor:
    """How many labels a mean loss is over: causal LMs drop each row's first, classifiers of rows have one each."""
    if not labels.is_floating_point() and labels.ndim == 2:
        is_causal = not is_encoder_decoder(model) and getattr(model, "loss_type", None) in (None, "ForCausalLM")
        return (labels[:, 1:] if is_causal else labels).ne(-100).sum()
    return torch.tensor(len(labels), device=labels.device)
