"""Labels of texts: 1 = hallucinated, 0 = true."""

from __future__ import annotations

from typing import Any

import numpy as np


__all__ = ["check_labels"]


def check_labels(labels: Any, name: str = "labels") -> np.ndarray:
    """`labels` as int64 `[T]`.

    Raises:
        ValueError: they are not 0 and 1, or only one of these.
    """
    array = np.asarray(labels)
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{name} has shape {array.shape} and values {np.unique(array)[:5].tolist()}; need one 0 (true) or "
            "1 (hallucinated) per row. Pass a flat list of 0s and 1s."
        )
    counts = np.bincount(array.astype(np.int64), minlength=2)
    if not counts.all():
        raise ValueError(
            f"{name} has {counts[0]} rows of label 0 and {counts[1]} of label 1; nothing can be told apart. "
            "Pass rows of both labels."
        )
    return array.astype(np.int64)
