"""Random states that are the same each time, and afterwards those of before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Seeds the generators of torch, numpy and Python, which collators and transforms of datasets draw from."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # all are seeded
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def seed_all(seed: int) -> None:
    """Seeds them, within :func:`repeatable`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
