"""Operations of answering from a memory, from prompts, and from a context whose keys and values are kept.

Counted as torch does: a multiplication and an addition are two; matrix products alone; attention over all pairs.
A write's step is a forward pass, and a backward pass to the memory that no weight's gradient is part of.

Legend: S context tokens, Q tokens of a query and its answer, A of these in the answer, P positions of the memory,
K inner steps, T tokens that go through the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


__all__ = ["AnswerCosts", "answer_costs"]


@dataclass(frozen=True)
class AnswerCosts:
    """Operations for contexts of one length.

    Attributes:
        write: K steps on the context, and the memory's keys and values for reading; once per context.
        read: a query and its answer, from the memory.
        prompt: the context, a query and its answer.
        context: the context's keys and values; once, if they are kept.
        cached: a query and its answer, with these at hand.
    """

    write: int
    read: int
    prompt: int
    context: int
    cached: int

    def per_query(self, queries: int) -> dict[str, float]:
        """Operations per answered query, if a context is asked so many."""
        return {
            "memory": self.write / queries + self.read,
            "prompt": self.prompt,
            "kept context": self.context / queries + self.cached,
        }

    @property
    def crossing(self) -> float:
        """Queries per context from which the memory costs less than prompts; infinite if it never does."""
        return _crossing(self.write, self.prompt - self.read)

    @property
    def crossing_cached(self) -> float:
        """Queries per context from which the memory costs less than a kept context; infinite if it never does."""
        return _crossing(self.write - self.context, self.cached - self.read)


def _crossing(once: int, gain: int) -> float:
    return max(1, math.floor(once / gain) + 1) if gain > 0 else math.inf


@dataclass(frozen=True)
class _Backbone:
    linear: int  # weights of the linear layers that every token goes through
    attention: int  # layers × their width
    head: int  # weights of the output layer

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Backbone:
        linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear | Conv1D))
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head_dim
        return cls(linear, config.num_hidden_layers * width, config.vocab_size * config.hidden_size)

    def forward(self, tokens: int, past: int = 0, logits: int = 0) -> int:
        return 2 * self.linear * tokens + self._attended(tokens, past) + 2 * self.head * logits

    def to_inputs(self, tokens: int, logits: int) -> int:
        """The backward pass: one product for each linear layer's, two for each of attention's."""
        return 2 * self.linear * tokens + 2 * self._attended(tokens, 0) + 2 * self.head * logits

    def _attended(self, tokens: int, past: int) -> int:
        return 4 * self.attention * tokens * (tokens + past)


def answer_costs(
    model: PreTrainedModel, context_tokens: int, query_tokens: int, answer_tokens: int, K: int | None = None
) -> AnswerCosts:
    """What answers cost a model with a memory, and what they would cost its backbone.

    Args:
        model (`GradMemGPTForCausalLM`): only its sizes are read.
        context_tokens (`int`): S.
        query_tokens (`int`): Q, the answer included.
        answer_tokens (`int`): A.
        K (`int`, *optional*): steps of a write, default the configuration's.
    """
    backbone, prefix = _Backbone.of(model.backbone), model.n_prefix
    steps = model.config.K if K is None else K
    written = prefix + context_tokens
    step = backbone.forward(written, logits=context_tokens) + backbone.to_inputs(written, context_tokens)
    return AnswerCosts(
        write=steps * step + backbone.forward(prefix),
        read=backbone.forward(query_tokens, past=prefix, logits=answer_tokens),
        prompt=backbone.forward(context_tokens + query_tokens, logits=answer_tokens),
        context=backbone.forward(context_tokens),
        cached=backbone.forward(query_tokens, past=context_tokens, logits=answer_tokens),
    )
