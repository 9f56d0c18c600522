"""Hidden states of answers, for a linear probe as SAPLMA's; the classifier lives elsewhere.

Legend: T texts, L hookpoints, D width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.ghosttrack.reading.batching import (
    batches_by_length,
    check_lengths,
    forward_options,
    pad_token_of,
    padded,
)
from hf_gradtools.ghosttrack.reading.spans import encode_answers
from hf_gradtools.sae import hookpoints as hooks


__all__ = ["probe_features"]


@torch.inference_mode()
def probe_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    answer_starts: Sequence[int],
    hookpoints: Sequence[str],
    *,
    batch_size: int = 32,
) -> dict[str, NDArray[np.float32]]:
    """Hidden states at the last token of each answer, and their mean over its tokens.

    Source: SAPLMA, Azaria and Mitchell, arXiv 2304.13734. It costs one forward as far as the last hookpoint and
    `8 * T * L * D` bytes.

    Args:
        model (`PreTrainedModel`): a causal LM, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, a fast one.
        texts (`Sequence[str]`): prompts with their answers.
        answer_starts (`Sequence[int]`): character at which each answer begins.
        hookpoints (`Sequence[str]`): of one width, such as `["layers.5", "layers.11"]`.
        batch_size (`int`, defaults to 32): texts at a time, of similar lengths.

    Returns:
        `dict[str, array [T, L, D] float32]`: `"last"` and `"mean"`.
    """
    spans = encode_answers(tokenizer, texts, answer_starts)
    check_lengths(model, [span.input_ids for span in spans])
    widths = set(hooks.widths(model, hookpoints).values())
    if len(widths) != 1:
        raise ValueError(f"hookpoints have {len(widths)} widths, {sorted(widths)}; need one. Ask for them one by one.")
    shape = (len(spans), len(hookpoints), widths.pop())
    last, mean = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for batch in tqdm(list(batches_by_length([len(span.input_ids) for span in spans], batch_size)), desc="Probe"):
        ids, mask = padded([spans[row].input_ids for row in batch], pad_token_of(tokenizer), "right", model.device)
        states = hooks.run(model, hookpoints, ids, **forward_options(hooks.base_model(model), mask))
        for layer, state in enumerate(states.values()):
            for place, row in enumerate(batch):
                inside = state[place, spans[row].begin : spans[row].end].float()
                last[row, layer], mean[row, layer] = inside[-1].cpu().numpy(), inside.mean(0).cpu().numpy()
    return {"last": last, "mean": mean}
