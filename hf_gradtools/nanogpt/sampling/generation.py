"""Draws samples by `generate()`, with a cache, and keeps the logits that each token was drawn from.

B samples, P tokens of the prompt, T new tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.nanogpt.data.tokenizers import character_ids, encode_text
from hf_gradtools.nanogpt.modeling_nanogpt import NanoGPTForCausalLM
from hf_gradtools.nanogpt.output_softmax import OutputSoftmax
from hf_gradtools.nanogpt.sampling.options import SampleOptions
from hf_gradtools.nanogpt.sampling.segments import decode


__all__ = ["Sample", "context_length", "encode_prompt", "generate_samples"]


@dataclass
class Sample:
    """One continuation of a prompt.

    Args:
        prompt_ids: the prompt.
        ids: tokens drawn, up to and with the one that ended the text.
        logits: `[T, V]`, whose softmax is the model's probabilities, if they were asked for. They are those of its
            output layer, or the logarithms of what its `softmax_variant_output` makes of them.
        scores: `[T, V]`, log-weights that the tokens were drawn by: after temperature and truncation.
    """

    prompt_ids: list[int]
    ids: list[int]
    logits: Tensor | None = None
    scores: Tensor | None = None


def context_length(model: PreTrainedModel, block_size: int | None = None) -> int | None:
    """Tokens that the model may see at once: `block_size`, else what its config says; None if that says nothing.

    Raises:
        ValueError: `block_size` is more than the config allows.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)  # every model names it so, or has no such limit
    if block_size is not None and longest is not None and block_size > longest:
        raise ValueError(f"block_size={block_size} is more than the {longest} tokens of the model; pass at most that.")
    return longest if block_size is None else block_size


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a prompt, as the tokenizer begins a text; its first token, if the prompt is empty.

    Raises:
        ValueError: there is no token to begin with, or a character tokenizer does not know one of its characters.
    """
    is_char = character_ids(tokenizer) is not None
    ids: list[int] = encode_text(tokenizer, text) if is_char else tokenizer(text)["input_ids"]
    if ids:
        return ids
    beginning = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if text or beginning is None:
        raise ValueError(f"start={text[:40]!r} has no tokens; pass a text of at least one that the model knows.")
    return [beginning]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    options: SampleOptions,
    top_k: int = 0,
    keep_logits: bool = False,
) -> list[Sample]:
    """Continues a prompt `options.num_samples` times.

    The same options, seed and `batch_size` give the same samples; torch's own random state and the model's
    mode stay as they are.

    Args:
        model (`PreTrainedModel`): a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompt_ids (`Sequence[int]`): at least one token.
        options (`SampleOptions`): how to draw.
        top_k (`int`, defaults to 0): tokens that may follow; 0 allows all.
        keep_logits (`bool`, defaults to `False`): keep `logits` and `scores`, on the CPU in float32: 8·T·V bytes a
            sample.

    Returns:
        `list[Sample]`: in order.
    """
    limit = context_length(model, options.block_size) if options.crop_context else None
    config = _generation_config(model, tokenizer, options, top_k, keep_logits)
    was_training = model.training
    model.eval()
    samples: list[Sample] = []
    with _seeded(options.seed, model.device), torch.no_grad():
        while len(samples) < options.num_samples:
            rows = min(options.batch_size, options.num_samples - len(samples))
            prompt = torch.tensor([list(prompt_ids)] * rows, device=model.device)
            drawn = _generate(model, prompt, config, options.max_new_tokens, limit)
            samples += _split(drawn, prompt_ids, tokenizer, config, options.stop_strings)
    model.train(was_training)
    return samples


@dataclass
class _Drawn:
    """New tokens `[B, T]`, and per step `[B, V]` what they were drawn from."""

    ids: Tensor
    logits: list[Tensor]
    scores: list[Tensor]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SampleOptions, top_k: int, keep: bool
) -> GenerationConfig:
    """Says all that the options say, also what is off: an unset field would be filled from the model's own."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_eos
    drawing: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": 0 if options.softmax_threshold is not None else top_k,
            "top_p": options.top_p,
            "min_p": options.softmax_threshold,
        }
    return GenerationConfig(
        eos_token_id=eos,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=keep,
        output_scores=keep,
        **drawing,
    )


def _generate(model: PreTrainedModel, prompt: Tensor, config: GenerationConfig, new: int, limit: int | None) -> _Drawn:
    """In one call as long as the text fits into `limit` tokens; then token by token, of the last `limit` tokens."""
    context = prompt if limit is None else prompt[:, -limit:]
    fitting = new if limit is None else min(new, limit - context.shape[1])
    drawn = _Drawn(prompt[:, :0], [], [])
    if fitting > 0:
        context = _extend(drawn, model, context, config, fitting)
    eos = torch.tensor(_eos_ids(config), device=prompt.device)
    while limit is not None and drawn.ids.shape[1] < new and not torch.isin(drawn.ids, eos).any(-1).all():
        context = _extend(drawn, model, context[:, -limit:], config, 1)
    return drawn


def _extend(drawn: _Drawn, model: PreTrainedModel, context: Tensor, config: GenerationConfig, new: int) -> Tensor:
    """Draws up to `new` tokens after `context`, adds them to `drawn`, and returns both."""
    config = copy.copy(config)
    config.max_new_tokens = new
    output: Any = model.generate(context, attention_mask=torch.ones_like(context), generation_config=config)
    logits = output.logits or ()
    if isinstance(model, NanoGPTForCausalLM) and model.config.softmax_variant_output != "softmax":
        weighting = OutputSoftmax(model.config).to(model.device)
        logits = [weighting(None, step) for step in logits]
    drawn.ids = torch.cat([drawn.ids, output.sequences[:, context.shape[1] :]], dim=1)
    drawn.logits += [step.float().cpu() for step in logits]
    drawn.scores += [step.float().cpu() for step in output.scores or ()]
    return output.sequences


def _split(
    drawn: _Drawn,
    prompt_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    stop_strings: Sequence[str],
) -> list[Sample]:
    samples = []
    for row, ids in enumerate(drawn.ids.tolist()):
        ids = ids[: _end(ids, tokenizer, _eos_ids(config), stop_strings)]
        logits, scores = (
            torch.stack([step[row] for step in steps[: len(ids)]]) if steps else None
            for steps in (drawn.logits, drawn.scores)
        )
        samples.append(Sample(list(prompt_ids), ids, logits, scores))
    return samples


def _end(ids: list[int], tokenizer: PreTrainedTokenizerBase, eos: list[int], stop_strings: Sequence[str]) -> int:
    """How many tokens there are up to and with the one that ends the text."""
    end = next((i + 1 for i, token in enumerate(ids) if token in eos), len(ids))
    if not stop_strings or not any(stop in decode(tokenizer, ids[:end]) for stop in stop_strings):
        return end
    return next(i for i in range(1, end + 1) if any(stop in decode(tokenizer, ids[:i]) for stop in stop_strings))


def _eos_ids(config: GenerationConfig) -> list[int]:
    eos = config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draws inside are of `seed`; the generators outside do not notice."""
    kept = [device] if device.type in ("cuda", "xpu") else []  # beside the CPU's
    with torch.random.fork_rng(devices=kept, device_type=device.type if kept else "cuda"):
        torch.manual_seed(seed)
        yield
