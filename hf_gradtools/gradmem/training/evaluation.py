"""How well queries are answered, from memories or from prompts: by teacher forcing and by generation.

Legend: B contexts, N queries, Q tokens of a query and its answer, A tokens of an answer, K inner steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.gradmem.kv_retrieval import exact_match, token_accuracy


__all__ = ["Means", "answers", "evaluate_batches", "evaluate_rows", "ignored_ids", "with_wrong_contexts"]

IGNORED = -100
STRUCTURE = "!|"


class Means:
    """Weighted means that several processes add up to."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)

    def add(self, name: str, mean: float | Tensor, weight: int) -> None:
        """Adds `weight` values of a mean; one of none, which is no number, adds nothing."""
        if weight == 0:
            return
        self.sums[name] += float(mean) * weight
        self.weights[name] += weight

    def values(self, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means; `total` adds a tensor over all processes, which must have added to the same names."""
        names = sorted(self.sums)
        pairs = torch.tensor([[self.sums[name], self.weights[name]] for name in names], dtype=torch.float64)
        pairs = pairs if total is None else total(pairs)
        return {name: (pair[0] / pair[1]).item() for name, pair in zip(names, pairs, strict=True) if pair[1] > 0}


@torch.no_grad()
def evaluate_batches(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    ignored_ids: tuple[int, ...] = (),
    *,
    K: int | None = None,
    generation: bool = True,
    total: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Answers queries from memories, if the batches have contexts of their own, else from their prompts.

    Args:
        model (`PreTrainedModel`): in evaluation mode; a `GradMemGPTForCausalLM` if there are contexts.
        batches (`Iterable[dict]`): of a `GradMemCollator` or a `PromptCollator`, on the model's device.
        ignored_ids (`tuple[int, ...]`): structure symbols that accuracy by teacher forcing does not count.
        K (`int`, *optional*): steps of a write, default the configuration's.
        generation (`bool`, defaults to `True`): also answer greedily.
        total (`Callable`, *optional*): see [`Means.values`].

    Returns:
        `dict[str, float]`: `loss` per token of the answers, `exact_match` and `token_accuracy` by teacher forcing;
        `generated_exact_match` of whole answers, structure symbols included; with contexts also `inner_loss_0` …
        `inner_loss_K` (after so many steps) and `memory_norm`, the mean norm of a memory's vectors.
    """
    means = Means()
    for batch in batches:
        batch = dict(batch)
        memory = _write(model, batch, K, means) if "context_ids" in batch else {}
        _teacher_forcing(model, batch, memory, ignored_ids, means)
        if generation:
            _generation(model, batch, memory, means)
    return means.values(total)


def evaluate_rows(
    model: PreTrainedModel,
    rows: Dataset,
    *,
    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int = 64,
    **options: Any,
) -> dict[str, float]:
    """[`evaluate_batches`] of rows, in evaluation mode.

    Args:
        model (`PreTrainedModel`): a `GradMemGPTForCausalLM`, or a causal LM for prompts.
        rows (`datasets.Dataset`): see `generate_kv_dataset`.
        collator (`Callable`): a `GradMemCollator` or a `PromptCollator`.
        batch_size (`int`, defaults to 64): rows in a batch.
        **options: of [`evaluate_batches`].
    """
    loader = DataLoader(rows, batch_size, collate_fn=collator, generator=torch.Generator())
    batches = ({name: value.to(model.device) for name, value in batch.items()} for batch in loader)
    return evaluate_batches(model.eval(), batches, **options)


def with_wrong_contexts(rows: Dataset) -> Dataset:
    """The rows, each with the context of the row before it: what is answered right then, context did not help."""
    contexts = rows["context"][:]
    return rows.remove_columns("context").add_column("context", contexts[-1:] + contexts[:-1])


def ignored_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of an answer that are the same in all, and that accuracy by teacher forcing does not count."""
    ids = [tokenizer(symbol, add_special_tokens=False).input_ids for symbol in STRUCTURE]
    return tuple(tokens[0] for tokens in ids if len(tokens) == 1)


def _write(model: Any, batch: dict[str, Tensor], K: int | None, means: Means) -> dict[str, Any]:
    """Writes the batch's contexts, which it takes out."""
    context_ids, mask = batch.pop("context_ids"), batch.pop("context_attention_mask", None)
    memory = model.write(context_ids, mask, K=K)
    before = torch.tensor([entry["writes"][-1]["inner_losses"] for entry in memory.provenance])
    losses = [*before.unbind(1), model.inner_loss(context_ids, mask, memory=memory)]
    for step, loss in enumerate(losses):
        means.add(f"inner_loss_{step}", loss.mean(), len(loss))
    means.add("memory_norm", memory.mem.float().norm(dim=-1).mean(), len(memory))
    return {"memory": memory}


def _teacher_forcing(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    memory: dict[str, Any],
    ignored_ids: tuple[int, ...],
    means: Means,
) -> None:
    output = model(**batch, **memory)
    predictions, labels = output.logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
    means.add("loss", output.loss, int((labels != IGNORED).sum()))
    counted = (labels != IGNORED) & ~torch.isin(labels, torch.tensor(ignored_ids, device=labels.device))
    means.add("exact_match", exact_match(predictions, labels, ignored_ids), int(counted.any(1).sum()))
    means.add("token_accuracy", token_accuracy(predictions, labels, ignored_ids), int(counted.sum()))


def _generation(model: Any, batch: dict[str, Tensor], memory: dict[str, Any], means: Means) -> None:
    prompts, prompt_mask, wanted = answers(batch)
    generated = model.generate(
        prompts,
        attention_mask=prompt_mask,
        max_new_tokens=wanted.shape[1],
        do_sample=False,
        use_cache=True,
        **memory,
    )[:, prompts.shape[1] :]
    missing = wanted.shape[1] - generated.shape[1]  # all rows ended early
    generated = torch.nn.functional.pad(generated, (0, missing), value=IGNORED)
    right = ((generated == wanted) | (wanted == IGNORED)).all(1)
    means.add("generated_exact_match", right.float().mean(), len(right))


def answers(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What comes before the labels, for `generate`, and the labels themselves.

    Args:
        batch (`dict`): `input_ids`, `attention_mask` and `labels`, each `[N, Q]`; in a row the labels are together.

    Returns:
        prompts `[N, P]`, padded on the left, with their mask; and answers `[N, A]`, padded with −100 on the right.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    begins = (labels != IGNORED).int().argmax(1).tolist()
    prompts = [row[:begin][keep[:begin].bool()].flip(0) for row, keep, begin in zip(ids, mask, begins, strict=True)]
    ones = [torch.ones_like(prompt) for prompt in prompts]
    pad = torch.nn.utils.rnn.pad_sequence  # on the right: the prompts are turned round and back
    wanted = [row[row != IGNORED] for row in labels]
    return (
        pad(prompts, batch_first=True).flip(1),
        pad(ones, batch_first=True).flip(1),
        pad(wanted, batch_first=True, padding_value=IGNORED),
    )
