"""Activations as a model makes them: one forward for all hookpoints, any token at any time.

B sequences of S = context_length tokens go through the model at once; of each sequence the first `skip_positions`
tokens are left out, so token t is position `skip_positions + t % per_sequence` of sequence `t // per_sequence`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_gradtools.core.inference import evaluating, free_cached_memory, is_out_of_memory
from hf_gradtools.sae.hookpoints import base_model, run, widths


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["ModelActivations"]

logger = logging.getLogger(__name__)


class ModelActivations:
    """The activations of packed sequences, computed when they are asked for; an [`ActivationSource`].

    Forwards always take the same sequences together (the first `batch_size`, the next, ...), wherever reading starts,
    so a token has the same bits each time. When memory runs out, batches are halved, with a warning, and the tokens
    that failed come again; sums are then rounded otherwise in the last bits.

    Args:
        model (`PreTrainedModel`): a causal LM; runs in eval mode, without gradients and without its head.
        sequences (`Tensor`): `[sequences, context_length]` token ids, see [`token_blocks`].
        hookpoints (`Sequence[str]`): such as `["layers.5"]`, see [`~hf_gradtools.sae.hookpoints.resolve`].
        batch_size (`int`, defaults to 8): sequences of a forward.
        dtype (`torch.dtype`, defaults to `torch.bfloat16`): of the activations; the model computes in its own.
        skip_positions (`int`, defaults to 1): first positions of each sequence that are left out: attention sinks,
            whose activations are orders of magnitude larger than all others.

    Attributes:
        num_tokens (`int`): activations of each hookpoint.
        tokens_per_sequence (`int`): of them.
        batch_size (`int`): sequences that belong together.
        forward_size (`int`): sequences that go through the model at once; smaller after memory ran out.

    Raises:
        ValueError: if a hookpoint does not exist, or the sequences do not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        hookpoints: Sequence[str],
        batch_size: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        skip_positions: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; need at least 1 sequence. Pass batch_size=1 or more.")
        _check_sequences(model, sequences, skip_positions)
        self.model, self.sequences = model, sequences
        self.hookpoints = list(hookpoints)
        self.batch_size = self.forward_size = batch_size
        self.dtype, self.skip_positions = dtype, skip_positions
        self.tokens_per_sequence: int = sequences.shape[1] - skip_positions
        self.num_tokens: int = len(sequences) * self.tokens_per_sequence
        self._widths = widths(model, self.hookpoints)

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return self._widths[hookpoint]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.chunks()

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The activations of the tokens from `start` to `end`, a forward at a time.

        Args:
            start (`int`, defaults to 0): first token.
            end (`int`, *optional*): after the last; default all.

        Yields:
            `dict[str, Tensor]`: `[n, D]` by hookpoint, on the model's device.
        """
        end = self.num_tokens if end is None else end
        if not 0 <= start <= end <= self.num_tokens:
            raise ValueError(f"start={start}, end={end} are not within the {self.num_tokens} tokens in order.")
        return self._chunks(start, end)

    def _chunks(self, start: int, end: int) -> Iterator[dict[str, Tensor]]:
        per = self.tokens_per_sequence
        while start < end:
            sequence = start // per
            batch = sequence - sequence % self.batch_size  # where the sequences that belong together begin
            first = sequence - (sequence - batch) % self.forward_size
            last = min(first + self.forward_size, batch + self.batch_size, len(self.sequences))
            captured = self._forward(first, last)
            if captured is None:
                continue
            low, high = start - first * per, min(end, last * per) - first * per
            yield {name: self._flat(state)[low:high] for name, state in captured.items()}
            start = first * per + high

    def _flat(self, state: Tensor) -> Tensor:
        """[B, S, D] -> [tokens, D] in the dtype asked for."""
        return state[:, self.skip_positions :].to(self.dtype).reshape(-1, state.shape[-1])

    def _forward(self, first: int, last: int) -> dict[str, Tensor] | None:
        """The hidden states of some sequences, or `None` if memory ran out and fewer are to be tried."""
        ids = self.sequences[first:last].to(self.model.device, torch.long)
        try:
            with evaluating(self.model):
                return run(self.model, self.hookpoints, input_ids=ids)
        except RuntimeError as error:
            if not is_out_of_memory(error) or last - first == 1:
                raise
            reason = str(error).split("\n")[0]
        # Out of the except block nothing holds the tensors of the failed forward any more.
        free_cached_memory()
        self.forward_size = max(1, (last - first) // 2)
        logger.warning(
            "out of memory at %d sequences of %d tokens at once (%s); going on with %d. Pass that as batch_size.",
            last - first,
            self.sequences.shape[1],
            reason,
            self.forward_size,
        )
        return None


def _check_sequences(model: PreTrainedModel, sequences: Tensor, skip_positions: int) -> None:
    shape = tuple(sequences.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"sequences has shape {shape}; need [sequences, context_length], at least 1 of each. "
                         "Pass token_blocks(texts, tokenizer, context_length).")  # fmt: skip
    if not 0 <= skip_positions < shape[1]:
        raise ValueError(
            f"skip_positions={skip_positions} leaves none of context_length={shape[1]} tokens, or is negative. "
            f"Pass 0 ... {shape[1] - 1}."
        )
    config = base_model(model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)  # models without learned positions need none
    if positions is not None and shape[1] > positions:
        raise ValueError(
            f"sequences have context_length={shape[1]}, the model takes {positions} positions. "
            f"Pass token_blocks(..., context_length={positions})."
        )
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"sequences hold token {low if low < 0 else high}, outside the model's vocabulary of {config.vocab_size}. "
            "Pass the tokenizer of this model to token_blocks."
        )
