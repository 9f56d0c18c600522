"""What a detector has to beat: length, log-probability, entropy and P(True) of an answer, in batched passes.

Legend: T texts, B texts of a batch, S their padded length, A last positions that predict answers, M answer tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.ghosttrack.reading.batching import (
    batches_by_length,
    check_lengths,
    entropies,
    forward_options,
    pad_token_of,
    padded,
)
from hf_gradtools.ghosttrack.reading.spans import AnswerSpan, encode_answers


__all__ = ["SCALARS", "answer_scalars", "p_true", "true_false_prompt"]

SCALARS = (
    "answer_characters", "answer_tokens", "mean_logprob", "sum_logprob", "min_logprob", "perplexity", "mean_entropy",
    "max_entropy", "p_true", "semantic_entropy", "generated_tokens", "generated_mean_logprob",
    "generated_sum_logprob", "generated_min_logprob", "generated_mean_entropy", "generated_max_entropy",
)  # fmt: skip
"""Columns that baselines are made of, those that `generate_answers` leaves included. None has a sign of its own: which
end of it speaks for a hallucination is decided on training rows, which can only help a baseline."""

QUESTION_PROMPT = "Question: {question}\nProposed answer: {answer}\nIs the proposed answer True or False?\nIt is:"
CLAIM_PROMPT = "Claim: {answer}\nIs the claim True or False?\nIt is:"
TOKENS_PER_CHUNK = 256  # [M, V] in float32: 50 MB at V = 49,152


@torch.inference_mode()
def answer_scalars(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    answer_starts: Sequence[int],
    *,
    batch_size: int = 32,
    padding_side: Literal["left", "right"] = "left",
) -> dict[str, NDArray[np.float64]]:
    """Scalars of the answers at the ends of texts, from one forward pass of each text.

    Logits are asked for at the last A positions only, `B * A * V` numbers in the model's type; left padding keeps A
    at the longest answer. In float32 there are never more than `256 * V`. The first token of a text that no special
    token precedes has no probability and does not count.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, a fast one.
        texts (`Sequence[str]`): prompts with their answers.
        answer_starts (`Sequence[int]`): character at which each answer begins.
        batch_size (`int`, defaults to 32): texts at a time, of similar lengths.
        padding_side (`str`, defaults to `"left"`): changes cost, not results.

    Returns:
        `dict[str, array [T]]`: `answer_characters`, `answer_tokens`, `mean_logprob`, `sum_logprob`, `min_logprob` of
        the answer's tokens, `perplexity`, `mean_entropy` and `max_entropy` of the distributions that predict them
        (nats).

    Raises:
        ValueError: see `encode_answers`; also if an answer is but the first token of its text, or a text too long.
    """
    spans = encode_answers(tokenizer, texts, answer_starts)
    check_lengths(model, [span.input_ids for span in spans])
    begins = [max(span.begin, 1) for span in spans]
    for row, (begin, span) in enumerate(zip(begins, spans, strict=True)):
        if begin >= span.end:
            raise ValueError(
                f"text {row} is one token, {texts[row]!r}, and nothing predicts it. Put a prompt before the answer."
            )
    result = {
        "answer_characters": [len(text[start:].strip()) for text, start in zip(texts, answer_starts, strict=True)],
        "answer_tokens": [span.end - span.begin for span in spans],
    }
    found: list[list[float]] = [[] for _ in spans]
    batches = list(batches_by_length([len(span.input_ids) for span in spans], batch_size))
    for batch in tqdm(batches, desc="Log-probabilities"):
        parts = _token_scalars(model, tokenizer, [spans[i] for i in batch], [begins[i] for i in batch], padding_side)
        for row, (logprobs, entropy) in zip(batch, parts, strict=True):
            found[row] = _summaries(logprobs, entropy)
    names = ("mean_logprob", "sum_logprob", "min_logprob", "perplexity", "mean_entropy", "max_entropy")
    columns = np.array(found, dtype=np.float64).reshape(len(spans), len(names)).T
    sizes = {name: np.array(values, dtype=np.float64) for name, values in result.items()}
    return {**sizes, **dict(zip(names, columns, strict=True))}


def true_false_prompt(question: str | None, answer: str) -> str:
    """The fixed question of [`p_true`] about an answer, or about a claim if there is no question."""
    template = QUESTION_PROMPT if question else CLAIM_PROMPT
    return template.format(question=(question or "").strip(), answer=answer.strip())


@torch.inference_mode()
def p_true(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, batch_size: int = 32
) -> NDArray[np.float64]:
    """Log-odds that the model goes on with " True" rather than " False", from one forward pass of each prompt.

    Source: P(True) of Kadavath et al., arXiv 2207.05221, without few-shot examples.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str]`): see [`true_false_prompt`].
        batch_size (`int`, defaults to 32): prompts at a time.

    Raises:
        ValueError: the tokenizer merges a prompt's end with what follows, or a prompt is too long.
    """
    rows = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]] if len(prompts) else []
    check_lengths(model, rows)
    true, false = _first_tokens(tokenizer, " True", " False")
    odds = np.zeros(len(rows))
    for batch in tqdm(list(batches_by_length([len(row) for row in rows], batch_size)), desc="P(True)"):
        ids, mask = padded([rows[row] for row in batch], pad_token_of(tokenizer), "left", model.device)
        logits = model(ids, **forward_options(model, mask, keep=1)).logits[:, -1]
        odds[batch] = (logits[:, true].double() - logits[:, false].double()).cpu().numpy()
    return odds


def _token_scalars(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spans: Sequence[AnswerSpan],
    begins: Sequence[int],
    side: Literal["left", "right"],
) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of each span's tokens from its `begins` on, in float64."""
    ids, mask = padded([span.input_ids for span in spans], pad_token_of(tokenizer), side, model.device)
    S = ids.shape[1]
    shifts = [S - len(span.input_ids) if side == "left" else 0 for span in spans]
    kept = S - min(begin - 1 + shift for begin, shift in zip(begins, shifts, strict=True))
    logits = model(ids, **forward_options(model, mask, keep=kept)).logits[:, -kept:]
    places = [
        (row, place + shift)
        for row, (span, begin, shift) in enumerate(zip(spans, begins, shifts, strict=True))
        for place in range(begin, span.end)
    ]
    rows, columns = torch.tensor(places, device=ids.device).T
    logprobs, entropy = _chosen(logits, rows, columns - 1 - (S - kept), ids[rows, columns])
    counts = [span.end - begin for span, begin in zip(spans, begins, strict=True)]
    return list(zip(logprobs.split(counts), entropy.split(counts), strict=True))


def _chosen(logits: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """log p(token) and entropy, both [M], at chosen places of logits [B, A, V]."""
    parts = []
    for chunk in torch.arange(len(rows), device=rows.device).split(TOKENS_PER_CHUNK):
        picked = logits[rows[chunk], columns[chunk]]
        logprobs = picked.to(torch.promote_types(picked.dtype, torch.float32)).log_softmax(-1)
        parts.append((logprobs.gather(1, tokens[chunk, None])[:, 0].double(), entropies(logprobs).double()))
    logprobs, entropy = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return logprobs, entropy


def _summaries(logprobs: Tensor, entropy: Tensor) -> list[float]:
    mean = logprobs.mean()
    values = (mean, logprobs.sum(), logprobs.min(), (-mean).exp(), entropy.mean(), entropy.max())
    return [float(value) for value in values]


def _first_tokens(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> tuple[int, int]:
    """The tokens in which two continuations of a prompt first differ, directly behind it."""
    tail = CLAIM_PROMPT.rpartition("\n")[2]
    before, a, b = (tokenizer(tail + end, add_special_tokens=False)["input_ids"] for end in ("", first, second))
    shared = commonprefix([a, b])
    if list(shared) != list(before) or len(a) == len(shared) or len(b) == len(shared):
        raise ValueError(
            f"{type(tokenizer).__name__} has no single tokens in which {first!r} and {second!r} differ behind "
            f"{tail!r}; P(True) needs them. Leave P(True) out for this model."
        )
    return int(a[len(shared)]), int(b[len(shared)])
