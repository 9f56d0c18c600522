"""Scalars of the answers for the baselines, computed once and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.phases.common import load_language_model


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.answers.detection_rows import DetectionRows
    from hf_gradtools.ghosttrack.settings.configuration import GhostTrackConfig


__all__ = ["answer_scalars_of", "halving"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def answer_scalars_of(config: GhostTrackConfig, data: DetectionRows, folder: Path) -> dict[str, np.ndarray]:
    """`[T]` each: what `answer_scalars` and `p_true` give, and the scalars that the data set itself has.

    A tokenizer without words for True and False leaves P(True) out, with a warning.
    """
    from safetensors.numpy import load_file, save

    from hf_gradtools.ghosttrack.reading.answer_scalars import (
        SCALARS,
        answer_scalars,
        p_true,
        true_false_prompt,
    )

    file = folder / "scalars.safetensors"
    if not file.exists():
        model, tokenizer = load_language_model(config)
        size = config.detection.batch_size
        texts, starts = data.texts, data.answer_starts
        found = halving(lambda n: answer_scalars(model, tokenizer, texts, starts, batch_size=n), size)
        questions = data.column("question", "")
        answers = [text[start:] for text, start in zip(texts, starts, strict=True)]
        prompts = [true_false_prompt(*pair) for pair in zip(questions, answers, strict=True)]
        try:
            found["p_true"] = halving(lambda n: p_true(model, tokenizer, prompts, batch_size=n), size)
        except ValueError as error:
            logger.warning("P(True) is left out: %s", error)
        with atomic_write(file) as opened:
            opened.write(save({name: np.ascontiguousarray(values, np.float64) for name, values in found.items()}))
    scalars = load_file(file)
    for name in SCALARS:
        if name in data.rows.column_names and name not in scalars:
            scalars[name] = np.asarray(data.rows[name][:], np.float64)
    return {name: scalars[name] for name in SCALARS if name in scalars}


def halving(run: Callable[[int], T], batch_size: int) -> T:
    """Calls `run` with a batch size, and with half of it, with a warning, as often as memory runs out."""
    from hf_gradtools.core.inference import free_cached_memory, is_out_of_memory

    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
        free_cached_memory()
        batch_size //= 2
        logger.warning(
            "out of memory at %d texts at once; going on with %d. Set detection.batch_size to that.",
            batch_size * 2,
            batch_size,
        )
