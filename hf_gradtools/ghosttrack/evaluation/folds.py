"""Folds that keep every group (question) whole and every label's share alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_gradtools.ghosttrack.labels import check_labels


__all__ = ["grouped_folds"]


def grouped_folds(labels: Any, groups: Any, n_folds: int = 5, seed: int = 0) -> np.ndarray:
    """Deals groups to folds, larger ones first, each to the fold that lacks its labels most.

    Args:
        labels (`[T]`): 0 or 1.
        groups (`[T]`): ids, numbers or strings; rows of one group come to one fold.
        n_folds (`int`, defaults to 5): number of folds.
        seed (`int`, defaults to 0): of the order in which equal groups are dealt.

    Returns:
        `np.ndarray`: the fold of each row, int64 `[T]`.

    Raises:
        ValueError: there are too few groups for every fold to hold both labels.
    """
    labels = check_labels(labels)
    names, group_of_row = np.unique(np.asarray(groups), return_inverse=True)
    if len(group_of_row) != len(labels):
        raise ValueError(f"groups has {len(group_of_row)} rows; labels has {len(labels)}. Pass one group id per row.")
    if n_folds < 2:
        raise ValueError(f"n_folds={n_folds} must be at least 2.")
    counts = np.stack([np.bincount(group_of_row[labels == label], minlength=len(names)) for label in (0, 1)], axis=1)
    with_label = (counts > 0).sum(axis=0)
    if with_label.min() < n_folds:
        raise ValueError(
            f"n_folds={n_folds} needs at least {n_folds} groups with each label; {with_label[0]} of {len(names)} "
            f"groups have label 0 and {with_label[1]} label 1. Pass fewer folds or rows of more questions."
        )
    fold_of_group = _deal(counts / counts.sum(axis=0), n_folds, np.random.default_rng(seed))
    folds = fold_of_group[group_of_row]
    table = np.stack([np.bincount(folds[labels == label], minlength=n_folds) for label in (0, 1)])
    if not table.all():
        raise ValueError(
            f"n_folds={n_folds} leaves fold {int((table == 0).any(axis=0).argmax())} with one label only, as the "
            f"largest of {len(names)} groups has {counts.sum(axis=1).max()} of {len(labels)} rows. Pass fewer folds."
        )
    return folds


def _deal(shares: np.ndarray, n_folds: int, generator: np.random.Generator) -> np.ndarray:
    """`shares` `[G, 2]`: part of all rows of each label that a group holds. Returns the fold of each group."""
    order = generator.permutation(len(shares))
    order = order[np.argsort(-shares[order].max(axis=1), kind="stable")]
    held, folds = np.zeros((n_folds, 2)), np.empty(len(shares), np.int64)
    for group in order:
        fold = int((held @ shares[group]).argmin())  # least growth of the sum of squares
        folds[group] = fold
        held[fold] += shares[group]
    return folds
