"""How much of a model's next-token prediction survives where autoencoders stand in for its hidden states.

B sequences, S positions, D = d_in, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradtools.core.inference import evaluating
from hf_gradtools.sae.hookpoints import base_model
from hf_gradtools.sae.interventions import edit, replace
from hf_gradtools.sae.modeling_sae import SAE


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["CrossEntropy", "cross_entropy_recovered", "next_token_losses"]

TOKENS_PER_PIECE = 1024  # whose logits are in memory at once
CHECKED_TOKENS = 8


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropy, in nats a token, with a hidden state as it is and replaced.

    Args:
        model (`float`): of the model as it is.
        sae (`float`): with reconstructions.
        zero (`float`): with zeros.
        mean (`float`): with the mean hidden state.
        recovered (`float`, *optional*): (zero − sae) / (zero − model): 1 is no loss; `None` if zeros do no harm.
        recovered_over_mean (`float`, *optional*): (mean − sae) / (mean − model), a harder measure.
    """

    model: float
    sae: float
    zero: float
    mean: float
    recovered: float | None
    recovered_over_mean: float | None


@torch.no_grad()
def cross_entropy_recovered(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    sequences: Tensor,
    means: Mapping[str, Tensor],
    *,
    batch_size: int = 8,
    skip_positions: int = 1,
    progress: bool = True,
) -> dict[str, CrossEntropy]:
    """The cross-entropy with each hookpoint's hidden states replaced, one hookpoint at a time.

    Costs 1 + 3 · hookpoints forwards of each sequence. All predictions count, those from positions that are left
    as they are too; they cancel in the scores.

    Args:
        model (`PreTrainedModel`): a causal LM with its head.
        saes (`Mapping[str, SAE]`): by hookpoint.
        sequences (`Tensor`): `[sequences, S]` token ids without padding.
        means (`Mapping[str, Tensor]`): `[D]` by hookpoint, what the mean replacement puts in.
        batch_size (`int`, defaults to 8): sequences of a forward.
        skip_positions (`int`, defaults to 1): first positions left as they are.
        progress (`bool`, defaults to `True`): whether a bar shows.

    Raises:
        ValueError: if the model has no head, or sequences have one token.
    """
    if model.get_output_embeddings() is None:
        raise ValueError(f"model is a {type(model).__name__} without a head. Pass AutoModelForCausalLM's model.")
    if sequences.shape[1] < 2:
        raise ValueError("sequences have 1 token each; cross-entropy needs at least 2. Pass longer ones.")
    sums: dict[tuple[str, str], float] = dict.fromkeys(
        [("", "model"), *((name, kind) for name in saes for kind in ("sae", "zero", "mean"))], 0.0
    )
    with ExitStack() as modes:
        modes.enter_context(evaluating(model, *saes.values()))
        plain_head = _head_is_all(model, sequences)
        bar = modes.enter_context(
            tqdm(total=len(sequences) * len(sums), desc="cross-entropy", unit="seq", disable=not progress)
        )
        for ids in sequences.split(batch_size):
            ids = ids.to(model.device, torch.long)
            for name, kind in sums:
                with _replaced(model, name, kind, saes, means, skip_positions):
                    sums[name, kind] += sum(
                        float(part.double().sum()) for part in next_token_losses(model, ids, plain_head=plain_head)
                    )
                bar.update(len(ids))
    count = len(sequences) * (sequences.shape[1] - 1)
    values = {key: total / count for key, total in sums.items()}
    return {name: _scored(values["", "model"], *(values[name, k] for k in ("sae", "zero", "mean"))) for name in saes}


def next_token_losses(model: PreTrainedModel, input_ids: Tensor, *, plain_head: bool) -> Iterator[Tensor]:
    """The cross-entropies of a batch, some tokens at a time: float32 logits of no more exist at once.

    Args:
        model (`PreTrainedModel`): a causal LM.
        input_ids (`Tensor`): `[B, S]`.
        plain_head (`bool`): whether its logits are its output embeddings' of the last hidden states, and nothing else.

    Yields:
        `Tensor`: float32, `B · (S − 1)` of them in all.
    """
    targets = input_ids[:, 1:]
    if plain_head:
        states = base_model(model)(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        head = model.get_output_embeddings()
        rows = states.reshape(-1, states.shape[-1]).split(TOKENS_PER_PIECE)
        for part, wanted in zip(rows, targets.reshape(-1).split(TOKENS_PER_PIECE), strict=True):
            yield F.cross_entropy(head(part).float(), wanted, reduction="none")
        return
    for ids, wanted in zip(input_ids, targets, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        for part, some in zip(logits.split(TOKENS_PER_PIECE), wanted.split(TOKENS_PER_PIECE), strict=True):
            yield F.cross_entropy(part.float(), some, reduction="none")


def _head_is_all(model: PreTrainedModel, sequences: Tensor) -> bool:
    """Whether logits are the head's of the last hidden states: some models scale or cap them afterwards."""
    ids = sequences[:1, :CHECKED_TOKENS].to(model.device, torch.long)
    logits = model(input_ids=ids, use_cache=False).logits
    ours = model.get_output_embeddings()(base_model(model)(input_ids=ids, use_cache=False).last_hidden_state)
    return logits.shape == ours.shape and torch.allclose(logits.float(), ours.float(), rtol=1e-3, atol=1e-3)


def _replaced(
    model: PreTrainedModel,
    hookpoint: str,
    kind: str,
    saes: Mapping[str, SAE],
    means: Mapping[str, Tensor],
    skip_positions: int,
) -> ExitStack:
    stack = ExitStack()
    if kind == "sae":
        stack.enter_context(replace(model, {hookpoint: saes[hookpoint]}, skip_positions=skip_positions))
    elif kind == "zero":
        stack.enter_context(edit(model, {hookpoint: torch.zeros_like}, skip_positions=skip_positions))
    elif kind == "mean":
        mean = means[hookpoint]
        stack.enter_context(
            edit(model, {hookpoint: lambda state: mean.to(state).expand_as(state)}, skip_positions=skip_positions)
        )
    return stack


def _scored(model: float, sae: float, zero: float, mean: float) -> CrossEntropy:
    def share(bad: float) -> float | None:
        return (bad - sae) / (bad - model) if bad > model else None

    return CrossEntropy(model, sae, zero, mean, share(zero), share(mean))
