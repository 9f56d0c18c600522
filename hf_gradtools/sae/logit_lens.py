"""Which next tokens a feature speaks for: its decoder row through the unembedding. D = d_in, V = vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_gradtools.sae.modeling_sae import SAE


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["LogitLens", "logit_lens"]

FEATURES_PER_PIECE = 64


@dataclass(frozen=True)
class LogitLens:
    """The tokens that features make most and least likely, all `[F, k]`, strongest first.

    Args:
        promoted (`np.ndarray`): token ids.
        promoted_logits (`np.ndarray`): what a feature's activation of 1 adds to their logits, above the vocabulary's
            mean.
        suppressed (`np.ndarray`): token ids.
        suppressed_logits (`np.ndarray`): the same of these; negative.
    """

    promoted: np.ndarray
    promoted_logits: np.ndarray
    suppressed: np.ndarray
    suppressed_logits: np.ndarray


@torch.no_grad()
def logit_lens(model: PreTrainedModel, sae: SAE, features: Sequence[int], k: int = 10) -> LogitLens:
    """Decoder rows times the output embeddings, without the final norm and with all later layers left out.

    Args:
        model (`PreTrainedModel`): a causal LM with its head, whose width is `d_in`.
        sae ([`SAE`]): whose features they are.
        features (`Sequence[int]`): their numbers.
        k (`int`, defaults to 10): tokens of each kind.

    Raises:
        ValueError: if the model has no head, or one of another width.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model is a {type(model).__name__} without a head. Pass AutoModelForCausalLM's model.")
    unembedding = head.weight.float()  # [V, D]
    if unembedding.shape[1] != sae.config.d_in:
        raise ValueError(
            f"the head takes width {unembedding.shape[1]}, the SAE has d_in={sae.config.d_in}. Pass the model that "
            "the SAE was trained on; features of narrower modules have no logits."
        )
    rows = sae.W_dec[torch.as_tensor(list(features), device=sae.W_dec.device)].to(unembedding)
    parts = []
    for some in rows.split(FEATURES_PER_PIECE):
        logits = some @ unembedding.T
        logits -= logits.mean(1, keepdim=True)
        most, least = logits.topk(k), logits.topk(k, largest=False)
        parts.append([tensor.cpu() for tensor in (most.indices, most.values, least.indices, least.values)])
    return LogitLens(*(torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True)))
