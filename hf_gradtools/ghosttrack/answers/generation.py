"""Lines that a causal LM adds to prompts which begin alike: what they share is computed once.

Legend: B rows of a batch, P tokens that all prompts share, S padded length of what is left of them, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from hf_gradtools.ghosttrack.reading.batching import check_lengths, entropies, pad_token_of, padded


__all__ = ["Line", "LineGenerator"]

MIN_SHARED_TOKENS = 8  # below that a cache of them saves nothing


@dataclass(frozen=True)
class Line:
    """What the model wrote up to the end of the line.

    Attributes:
        text (`str`): as written, with its leading space, without what ended it.
        logprobs (`list[float]`): of its tokens (at temperature 1), without the one that ended the line.
        entropies (`list[float]`): in nats, of the distributions that its tokens were taken from.
        ended (`bool`): a newline or an end-of-text token came within `max_new_tokens`.
    """

    text: str
    logprobs: list[float]
    entropies: list[float]
    ended: bool


class LineGenerator:
    """Continues prompts of a set, in batches of your choice.

    Tokens with which all prompts begin (few-shot examples) run through the model once; each batch starts from copies
    of their keys and values. This is exact, and used where the model's cache is a plain one that keeps every position.

    Args:
        model (`PreTrainedModel`): a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer; its padding side does not matter.
        prompts (`Sequence[str]`): all prompts.
        max_new_tokens (`int`, defaults to 24): of a line.
        share_prefix (`bool`, defaults to `True`): whether to compute the common beginning once.

    Attributes:
        lengths (`list[int]`): tokens of each prompt.
        num_shared (`int`): P; 0 where nothing is shared.

    Raises:
        ValueError: a prompt has no tokens, or too many for the model's positions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 24,
        share_prefix: bool = True,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for an answer; pass at least 1.")
        self.model, self.tokenizer = model, tokenizer
        self.prompt_ids: list[list[int]] = tokenizer(list(prompts))["input_ids"] if prompts else []
        self.lengths = [len(row) for row in self.prompt_ids]
        if 0 in self.lengths:
            raise ValueError(f"prompt {self.lengths.index(0)} has no tokens. Leave it out.")
        check_lengths(model, self.prompt_ids, max_new_tokens)
        self.eos_token_ids = _end_tokens(model, tokenizer)
        fixed = {
            "max_new_tokens": max_new_tokens,
            "pad_token_id": pad_token_of(tokenizer),
            "eos_token_id": self.eos_token_ids or None,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "use_cache": True,
        }
        self._greedy = GenerationConfig(**fixed, do_sample=False)
        self._sampling = GenerationConfig(**fixed, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        self._ends_line = _line_ending_tokens(model, tokenizer, self.eos_token_ids)
        shared = min(len(commonprefix(self.prompt_ids)), min(self.lengths, default=1) - 1) if share_prefix else 0
        self._cache = self._prefill(shared) if shared >= MIN_SHARED_TOKENS and len(self.lengths) > 1 else None
        self.num_shared = shared if self._cache is not None else 0

    @torch.inference_mode()
    def __call__(self, rows: Sequence[int], *, seed: int | None = None) -> list[Line]:
        """Continues the prompts numbered `rows`, each as often as it is named.

        Args:
            rows (`Sequence[int]`): numbers of prompts.
            seed (`int`, *optional*): sample at temperature 1 from this seed, leaving torch's own generators as they
                are; greedy without it.
        """
        rest = [self.prompt_ids[row][self.num_shared :] for row in rows]
        input_ids, mask = padded(rest, pad_token_of(self.tokenizer), "left", self.model.device)
        options: dict[str, Any] = {}
        if self._cache is not None:
            shared = torch.tensor(self.prompt_ids[rows[0]][: self.num_shared], device=input_ids.device)
            shared = shared.expand(len(rows), -1)
            input_ids, mask = torch.cat([shared, input_ids], 1), torch.cat([torch.ones_like(shared), mask], 1)
            options["past_key_values"] = copy.deepcopy(self._cache)
            options["past_key_values"].batch_repeat_interleave(len(rows))
        recorder = _Recorder()
        with torch.random.fork_rng(_cuda_devices(self.model), enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            sequences = self.model.generate(
                input_ids,
                attention_mask=mask,
                generation_config=self._greedy if seed is None else self._sampling,
                logits_processor=LogitsProcessorList([recorder]),
                stopping_criteria=StoppingCriteriaList([_LineEnds(self._ends_line)]),
                **options,
            )
        return self._lines(rows, sequences[:, input_ids.shape[1] :], recorder)

    @torch.inference_mode()
    def _prefill(self, length: int) -> DynamicCache | None:
        """Keys and values of the first tokens, for one row; None if the model keeps them in another form."""
        ids = torch.tensor([self.prompt_ids[0][:length]], device=self.model.device)
        cache = self.model(ids, use_cache=True).get("past_key_values")  # a state-space model has none
        plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
        return cache if plain else None

    def _lines(self, rows: Sequence[int], new_tokens: Tensor, recorder: _Recorder) -> list[Line]:
        logprobs, entropy = recorder.result(new_tokens[:, -1])
        ends = self._ends_line[new_tokens]
        lines = []
        for row, (prompt, tokens) in enumerate(zip(rows, new_tokens.tolist(), strict=True)):
            ended = bool(ends[row].any())
            stop = int(ends[row].int().argmax()) if ended else len(tokens)
            text = self._decode_after(self.prompt_ids[prompt][-1], tokens[: stop + 1]).split("\n")[0].rstrip()
            count = max(stop, 1)  # an answer inside the token that ends the line is that token
            lines.append(Line(text, logprobs[row, :count].tolist(), entropy[row, :count].tolist(), ended))
        return lines

    def _decode_after(self, last: int, tokens: list[int]) -> str:
        """The text of tokens behind another: on their own some tokenizers strip their leading space."""
        before, both = self.tokenizer.batch_decode([[last], [last, *tokens]], skip_special_tokens=True)
        return both[len(before) :]


class _Recorder(LogitsProcessor):
    """Keeps log-probabilities and entropies of what is chosen, changing nothing; one step's [B, V] at a time."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []
        self.entropies: list[Tensor] = []
        self._waiting: Tensor | None = None  # until it is known what was chosen from them

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._choose(input_ids[:, -1])
        self._waiting = scores.log_softmax(-1)
        self.entropies.append(entropies(self._waiting))
        return scores

    def result(self, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, both [B, steps]."""
        self._choose(last_tokens)
        return torch.stack(self.chosen, 1), torch.stack(self.entropies, 1)

    def _choose(self, tokens: Tensor) -> None:
        if self._waiting is not None:
            self.chosen.append(self._waiting.gather(1, tokens[:, None])[:, 0])


class _LineEnds(StoppingCriteria):
    def __init__(self, ends_line: Tensor) -> None:
        self.ends_line = ends_line

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.ends_line[input_ids[:, -1]]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = given if isinstance(given, list) else [given]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


def _line_ending_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos: list[int]) -> Tensor:
    """[V] bool: tokens that hold a newline or end the text."""
    size = max(int(model.config.get_text_config().vocab_size), len(tokenizer))
    ends = torch.zeros(size, dtype=torch.bool)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends[: len(texts)] = torch.tensor(["\n" in text for text in texts])
    ends[eos] = True
    return ends.to(model.device)


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []
