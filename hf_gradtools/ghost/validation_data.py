"""The validation batches of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import default_collate

from ..core import distributed
from .config import GhostDotProdConfig
from .sample_ids import bare_collator


Rows = Any  # a map-style dataset


class ValidationData:
    """Cuts named validation sets into the batches that a step's gradient is taken on, the same for the same step.

    Args:
        datasets: one dataset, or several by name.
        train_dataloader: whose collator, and for `datasets.Dataset`s whose columns, validation rows get too.
        collate: another collator.
        config: batch sizes, `pairwise`, `seed`, `sample_id_column`.
        device: where batches are put.
        needs_labels: the loss is the model's own, so batches must have labels.

    Raises:
        ValueError: columns that training has are missing, or batches have no labels.
    """

    def __init__(
        self,
        datasets: Rows | Mapping[str, Rows],
        train_dataloader: Any,
        collate: Callable[[list[Any]], Any] | None,
        config: GhostDotProdConfig,
        device: torch.device,
        needs_labels: bool,
    ):
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self.collate = collate or bare_collator(loader.collate_fn) or default_collate
        self.config, self.device, self.needs_labels = config, device, needs_labels
        self.ids = {name: _ids(rows, config.sample_id_column) for name, rows in named(datasets).items()}
        self.rows = {
            name: _as_trained(rows, loader.dataset, name) if collate is None else rows
            for name, rows in named(datasets).items()
        }
        self._fixed: dict[str, tuple[list[Any], list[Any]]] = {}

    @staticmethod
    def check_not_empty(datasets: Rows | Mapping[str, Rows]) -> None:
        for name, rows in named(datasets).items():
            if len(rows) == 0:
                which = "val_dataset" if len(named(datasets)) == 1 else f"val_dataset[{name!r}]"
                raise ValueError(
                    f"{which} has 0 rows; GhostDotProdCallback needs at least 1 with 'labels'. "
                    "Pass val_dataset=ds['validation']."
                )

    def sizes(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.rows.items()}

    def batches(self, step: int) -> dict[str, tuple[list[Any], list[Any]]]:
        """For every set the collated micro-batches of optimizer step `step` that are this rank's, and the ids of all
        rows of the step."""
        return {name: self._batches_of(name, step) for name in self.rows}

    def _batches_of(self, name: str, step: int) -> tuple[list[Any], list[Any]]:
        if name in self._fixed:
            return self._fixed[name]
        rows, config = self.rows[name], self.config
        size = min(config.val_batch_size or len(rows), len(rows))
        chosen = self._order(len(rows), size, step // config.every_steps)
        chunk = 1 if config.pairwise else config.val_micro_batch_size or min(size, 16)
        starts = range(0, size, chunk)
        if not config.pairwise and config.method != "gram":  # these need all of it on every rank
            starts = starts[distributed.rank() :: distributed.world_size()]
        chunks = [self._collate(name, chosen[start : start + chunk]) for start in starts]
        result = chunks, [self.ids[name][i] for i in chosen]
        if size == len(rows):
            self._fixed[name] = result
        return result

    def _order(self, total: int, size: int, draw: int) -> list[int]:
        """Rows of the given draw: the set is gone through in seeded order, shuffled anew for every pass."""
        if size == total:
            return list(range(total))
        per_pass = total // size
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + draw // per_pass)
        start = draw % per_pass * size
        return torch.randperm(total, generator=generator)[start : start + size].tolist()

    def _collate(self, name: str, indices: list[int]) -> Any:
        rows = [self.rows[name][i] for i in indices]
        column = self.config.sample_id_column
        batch = self.collate(
            [{k: v for k, v in r.items() if k != column} if isinstance(r, Mapping) else r for r in rows]
        )
        if self.needs_labels and (not isinstance(batch, Mapping) or batch.get("labels") is None):
            raise ValueError(
                f"validation set {name!r} gives batches without 'labels' (columns {sorted(rows[0])}); add labels to "
                "its rows, pass a data_collator that makes them, or loss_fn=..."
            )
        return {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def named(datasets: Rows | Mapping[str, Rows]) -> dict[str, Rows]:
    """Datasets by name; a single one is called "validation"."""
    if isinstance(datasets, Mapping):
        return dict(datasets)
    return {"validation": datasets}


def _ids(rows: Rows, column: str) -> list[Any]:
    columns = getattr(rows, "column_names", None) or []
    return list(rows[column]) if column in columns else list(range(len(rows)))


def _as_trained(rows: Rows, train_rows: Rows, name: str) -> Rows:
    """Validation rows with the columns of the training rows (Trainer has removed what the model does not take)."""
    wanted = getattr(train_rows, "column_names", None)
    have = getattr(rows, "column_names", None)
    if not isinstance(wanted, list) or not isinstance(have, list):
        return rows
    missing = [column for column in ("input_ids", "labels") if column in wanted and column not in have]
    if missing:
        raise ValueError(
            f"validation set {name!r} has columns {have} and lacks {missing} of the training rows; prepare it as the "
            "training dataset is (same tokenization), or pass data_collator=..."
        )
    return rows.select_columns([column for column in have if column in wanted])
