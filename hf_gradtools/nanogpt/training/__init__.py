"""Training of nanoGPT variants with Trainer: options, exact resume, best checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.training.options import TrainOptions
    from hf_gradtools.nanogpt.training.run import run_flags
    from hf_gradtools.nanogpt.training.workflow import TrainResult, train

__all__ = ["TrainOptions", "TrainResult", "run_flags", "train"]

# The command lines import flags and options from here, and must not wait for Trainer.
_MODULES = {"TrainOptions": "options", "TrainResult": "workflow", "run_flags": "run", "train": "workflow"}

__getattr__ = lazy_names(__name__, _MODULES)
