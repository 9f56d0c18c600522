"""Runs a dataset through a model, window by window, and writes a row per sample."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...core import distributed
from ...core.store import MANIFEST
from .batches import BatchMaker, Window, row_ids
from .collector import ProjectionCollector
from .config import GradProjConfig
from .passes import GradientPass
from .randomness import seed_all
from .writer import GradientWriter


logger = logging.getLogger(__name__)


def write_rows(
    runs: GradientPass,
    collector: ProjectionCollector,
    batches: BatchMaker,
    dataset: Any,
    windows: Sequence[Window],
    writer: GradientWriter,
    config: GradProjConfig,
) -> None:
    """Projects the rows of this rank's windows that the store does not have yet, and completes it.

    Args:
        runs, collector: the pass, observed by the collector.
        batches: makes them.
        dataset: rows.
        windows: of this rank.
        writer: of this rank.
        config: `seed` and `on_nonfinite`.
    """
    ids = row_ids(dataset)
    total = sum(window.stop - window.start for window in windows)
    empty, done = 0, writer.num_rows
    with tqdm(total=total, initial=done, desc="Projecting", unit="row", smoothing=0.1) as bar:
        for window in windows:
            if window.stop - windows[0].start <= done:
                continue
            seed_all(config.seed + window.start)  # a resumed run draws what an undisturbed one did
            rows = torch.empty(window.stop - window.start, writer.dim)
            counts = torch.zeros(len(rows), dtype=torch.long)
            for indices in window.batches:
                places = torch.tensor(indices) - window.start
                gradients, found = runs.project(collector, batches(dataset, indices))
                rows[places], counts[places] = gradients.float().cpu(), torch.tensor(found)
                bar.update(len(indices))
            empty += int((counts == 0).sum())
            window_ids = ids[window.start : window.stop]
            if config.on_nonfinite == "skip":
                _zero_nonfinite(rows, window_ids)
            writer.append({"sample_id": window_ids, "gradient": rows, "num_tokens": counts})
    finish_all_ranks(writer)
    if empty:
        logger.warning("%d rows have no label that counts; their gradients are stored as zeros", empty)


def _zero_nonfinite(rows: Tensor, ids: Sequence[int | str]) -> None:
    bad = (~torch.isfinite(rows).all(1)).nonzero().flatten().tolist()
    if bad:
        logger.warning("the gradients of samples %s are not finite; zeros are stored", [ids[i] for i in bad])
        rows[bad] = 0.0


def finish_all_ranks(writer: GradientWriter) -> None:
    """Rank 0 marks the store complete once all other ranks have sealed theirs."""
    if distributed.rank() > 0:
        writer.finish()
    distributed.barrier()
    if distributed.rank() == 0:
        writer.finish()
    distributed.barrier()


def holds_rows(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a store with rows."""
    return (Path(folder) / MANIFEST).exists() and any(Path(folder).glob("shard-*"))
