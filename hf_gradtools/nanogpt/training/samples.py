"""Texts that a model writes while it trains, which do not disturb the training."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.data.tokenizers import UnknownCharacter, encode_text
from hf_gradtools.nanogpt.training.options import TrainOptions


__all__ = ["draw_sample", "sample_start"]


def sample_start(data: TokenFolder, options: TrainOptions) -> list[int]:
    """Ids of `sample_start_tokens`.

    Raises:
        ValueError: the dataset has no tokenizer, or it makes no tokens of them.
    """
    try:
        ids = encode_text(data.tokenizer, options.sample_start_tokens)
    except UnknownCharacter as error:
        raise ValueError(f"sample_start_tokens={options.sample_start_tokens!r}: {error}") from error
    if not ids:
        raise ValueError(f"sample_start_tokens={options.sample_start_tokens!r} is no token. Pass some text.")
    return ids


def draw_sample(model: PreTrainedModel, data: TokenFolder, options: TrainOptions) -> str:
    """A text as the `sample_*` options say; the generators of random numbers are left as they were."""
    start = torch.tensor([sample_start(data, options)], device=model.device)
    longest = getattr(model.config, "block_size", None)
    past_block = longest is not None and start.shape[1] + options.max_sample_tokens > longest
    crop = {"crop_to_block": True} if past_block and getattr(model.config, "use_abs_pos_embeddings", False) else {}
    was_training = model.training
    model.eval()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        ids = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=options.max_sample_tokens,
            do_sample=True,
            temperature=options.sample_temperature,
            top_k=min(options.sample_top_k, data.vocab_size),
            pad_token_id=0,
            **({} if crop else {"use_cache": True}),
            **crop,
        )
    model.train(was_training)
    return data.tokenizer.decode(ids[0])
