"""Reads back what the callback wrote."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..core.store import read_dataset
from .results import merge_duplicate_rows


if TYPE_CHECKING:
    from datasets import Dataset


def load_ghost_dataset(path: str | os.PathLike[str]) -> Dataset:
    """The rows of a run, one per optimizer step and sample, also while the run still writes them.

    Args:
        path: the callback's `output_dir`.

    Returns:
        a memory-mapped `datasets.Dataset` over all ranks. A sample that was served twice within a step (accelerate
        pads the last batch of an epoch so) has one row with the sum of both shares.

    Raises:
        ValueError: the folder holds no rows.
    """
    return merge_duplicate_rows(read_dataset(path))
