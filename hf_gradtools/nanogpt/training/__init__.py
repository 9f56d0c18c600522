"""Training of nanoGPT variants with Trainer: options, exact resume, best checkpoint."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.training.options import TrainOptions
    from hf_gradtools.nanogpt.training.run import run_flags
    from hf_gradtools.nanogpt.training.workflow import TrainResult, train

__all__ = ["TrainOptions", "TrainResult", "run_flags", "train"]

# The command lines import flags and options from here, and must not wait for Trainer.
_MODULES = {"TrainOptions": "options", "TrainResult": "workflow", "run_flags": "run", "train": "workflow"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
