"""Running a model that is not being trained: its mode, and memory that does not suffice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


__all__ = ["evaluating", "free_cached_memory", "is_out_of_memory"]

CPU_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory")  # what torch says, in a plain RuntimeError


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module in the mode that it was in."""
    training = [module for root in modules for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, of an accelerator or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in CPU_OUT_OF_MEMORY)


def free_cached_memory() -> None:
    """Gives back what torch's allocator keeps; call it outside of the except block, which holds the failed tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
