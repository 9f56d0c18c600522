"""Selects the training samples whose gradients point where a target task's do, as LESS does.

Source: Xia et al., LESS, arXiv 2402.04333; Carbonell and Goldstein, maximal marginal relevance, SIGIR 1998.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .queries import Reduction
from .search import Metric, Preconditioner, Searchable, prepare, stream_scores
from .writer import SAMPLE_ID


if TYPE_CHECKING:
    from datasets import Dataset

SCORE = "score"


def select(
    store: Searchable,
    target: Any,
    fraction: float | None = None,
    *,
    count: int | None = None,
    dataset: Dataset | None = None,
    metric: Metric = "cosine",
    precondition: Preconditioner | None = None,
    damping: float = 0.1,
    reduce: Reduction = "mean",
    diversity: float = 0.0,
    candidates: int = 4,
    progress: bool = True,
) -> Dataset:
    """The rows with the largest scores for a target: each row counts with its best over the target's tasks.

    Args:
        store: a [`GradientStore`] or [`GradientEnsemble`].
        target: as the queries of [`Searchable.search`]; a mapping from tasks to their queries, or one task.
        fraction: share of the rows to select, default 0.05.
        count: how many to select, in the place of `fraction`.
        dataset: that was projected; its rows are returned. They are joined by its column `sample_id`, or by their
            order where it has none.
        metric, precondition, damping: as in `search`.
        reduce: a task's score is the `"mean"` or `"max"` over its queries.
        diversity: from 0 to 1. Above 0, rows are picked one by one for
            `(1 - diversity) * relevance - diversity * similarity`: the score scaled to 0..1 over the candidates, and
            the largest cosine with a row that was picked before.
        candidates: only the best `candidates * count` rows are considered then. Their gradients are held in memory
            in float32, and picking costs `2 * candidates * count^2 * dim` FLOPs.
        progress: show a bar when it takes more than a second.

    Returns:
        a `datasets.Dataset`, best first: rows of `dataset` with a column `score`, or `row`, `sample_id` and `score`.

    Raises:
        ValueError: an option is out of range, or the dataset is not the one that was projected.
    """
    number = _budget(len(store), fraction, count)
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity={diversity}; pass a number from 0 (only relevance) to 1.")
    if candidates < 1:
        raise ValueError(f"candidates={candidates}; the pool needs at least 1 row for each to select.")
    if dataset is not None:
        _check_dataset(store, dataset)
    scores = score_rows(store, target, metric, precondition, damping, reduce, progress)
    order = np.argsort(-scores, kind="stable")
    if diversity > 0:
        pool = order[: candidates * number]
        order = pool[_diverse(_directions(store, pool), scores[pool], number, diversity, progress)]
    return _as_dataset(store, order[:number], scores, dataset)


def score_rows(
    store: Searchable,
    target: Any,
    metric: Metric = "cosine",
    precondition: Preconditioner | None = None,
    damping: float = 0.1,
    reduce: Reduction = "mean",
    progress: bool = True,
) -> np.ndarray:
    """The score of every row for a target, the best over its tasks: `[N]` float32. See [`select`]."""
    if reduce is None:
        raise ValueError("reduce=None; pass 'mean' or 'max', which makes one score of a task's queries.")
    queries, scorers = prepare(store, target, metric, precondition, damping, reduce, progress)
    best = np.empty(len(store), np.float32)
    for first, scores in stream_scores(store, queries, scorers, progress):
        best[first : first + len(scores)] = scores.amax(dim=1).numpy()
    return best


def _budget(rows: int, fraction: float | None, count: int | None) -> int:
    if fraction is not None and count is not None:
        raise ValueError(f"pass fraction={fraction} or count={count}, not both.")
    if count is not None:
        if not 1 <= count <= rows:
            raise ValueError(f"count={count}, but the store has {rows} rows. Pass 1 <= count <= {rows}.")
        return count
    share = 0.05 if fraction is None else fraction
    if not 0 < share <= 1:
        raise ValueError(f"fraction={fraction}; pass a share of the rows above 0 and up to 1, such as 0.05.")
    return max(1, round(share * rows))


def _check_dataset(store: Searchable, dataset: Dataset) -> None:
    if SCORE in dataset.column_names:
        raise ValueError("dataset has a column 'score' already; pass dataset.rename_column('score', 'old_score').")
    if SAMPLE_ID not in dataset.column_names and len(dataset) != len(store):
        raise ValueError(
            f"dataset has {len(dataset)} rows, the store {len(store)}, and no column 'sample_id' to join them by. "
            "Pass the dataset that was projected."
        )


def _directions(store: Searchable, rows: np.ndarray) -> Tensor:
    """Unit vectors `[n, d]`, whose products are the weighted cosines of all stores."""
    weights = torch.tensor(store.weights).abs()
    weights = weights / weights.sum()
    parts = [torch.nn.functional.normalize(part.rows(rows), dim=1) for part in store.stores]
    return torch.cat([weight.sqrt() * part for weight, part in zip(weights, parts, strict=True)], dim=1)


def _diverse(directions: Tensor, scores: np.ndarray, count: int, diversity: float, progress: bool) -> np.ndarray:
    """Greedy maximal marginal relevance: indices `[count]` in the order picked; of equal values the first."""
    relevance = torch.from_numpy(scores) - float(scores.min())
    relevance = (1 - diversity) * relevance / max(float(relevance.max()), 1e-30)
    similarity = torch.zeros(len(directions))
    picked = np.empty(count, np.int64)
    for step in tqdm(range(count), desc="Selecting", unit="row", disable=not progress, delay=1):
        picked[step] = chosen = int(torch.argmax(relevance - diversity * similarity))
        relevance[chosen] = -torch.inf
        found = directions @ directions[chosen]
        similarity = found if step == 0 else torch.maximum(similarity, found)
    return picked


def _as_dataset(store: Searchable, rows: np.ndarray, scores: np.ndarray, dataset: Dataset | None) -> Dataset:
    from datasets import Dataset as HfDataset

    chosen, ids = scores[rows], store.sample_ids[rows]
    if dataset is None:
        return HfDataset.from_dict({"row": rows, "sample_id": ids, SCORE: chosen})
    places = rows
    if SAMPLE_ID in dataset.column_names:
        where = {sample_id: place for place, sample_id in enumerate(dataset[SAMPLE_ID])}
        if len(where) < len(dataset):
            raise ValueError("dataset has sample_ids more than once; pass the dataset that was projected.")
        if missing := [sample_id for sample_id in ids.tolist() if sample_id not in where]:
            raise ValueError(
                f"dataset lacks {len(missing)} of the selected sample_ids, {missing[:3]} among them. "
                "Pass the dataset that was projected."
            )
        places = [where[sample_id] for sample_id in ids.tolist()]
    return dataset.select(places).add_column(SCORE, chosen)
