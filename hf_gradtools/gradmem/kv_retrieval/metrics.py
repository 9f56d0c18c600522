"""How many answers are right, and how many of their tokens.

Legend: N answers, Q tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_gradtools.gradmem.kv_retrieval.collating import IGNORE_INDEX


def exact_match(predictions: Tensor, labels: Tensor, ignored_ids: Sequence[int] = ()) -> float:
    """Share of the answers all of whose tokens are right.

    Args:
        predictions: `[N, Q]`, the token predicted for each place.
        labels: `[N, Q]`; −100 does not count, and rows without anything that counts neither.
        ignored_ids: labels that do not count, such as the structure symbols.
    """
    counts = _counted(labels, ignored_ids)
    return float(((predictions == labels) | ~counts).all(1)[counts.any(1)].float().mean())


def token_accuracy(predictions: Tensor, labels: Tensor, ignored_ids: Sequence[int] = ()) -> float:
    """Share of the tokens that are right; the arguments are [`exact_match`]'s."""
    return float((predictions == labels)[_counted(labels, ignored_ids)].float().mean())


def preprocess_logits_for_metrics(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """For `Trainer`: predicted tokens `[N, Q]` instead of logits `[N, Q, V]`, which would not fit into memory."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def compute_metrics(prediction: EvalPrediction, ignored_ids: Sequence[int] = ()) -> dict[str, Any]:
    """For `Trainer`, after [`preprocess_logits_for_metrics`]: "exact_match" and "token_accuracy".

    A causal LM's prediction at a place is of the next one: places are shifted here.
    """
    predictions = torch.as_tensor(prediction.predictions)[:, :-1]
    labels = torch.as_tensor(prediction.label_ids)[:, 1:]
    return {
        "exact_match": exact_match(predictions, labels, ignored_ids),
        "token_accuracy": token_accuracy(predictions, labels, ignored_ids),
    }


def _counted(labels: Tensor, ignored_ids: Sequence[int]) -> Tensor:
    return (labels != IGNORE_INDEX) & ~torch.isin(
        labels, torch.tensor(ignored_ids, dtype=labels.dtype).to(labels.device)
    )
