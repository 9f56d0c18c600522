"""What `hf-gradtools ghost train` leaves in its folder, read back: also while it still trains."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_gradtools.core.store import MANIFEST, read_manifest
from hf_gradtools.ghost.loading import load_ghost_dataset
from hf_gradtools.ghost.report import write_report
from hf_gradtools.ghost.results import GhostValues, ghost_values, validation_set_names
from hf_gradtools.workflow.data import read_texts


__all__ = ["StoredRun"]

# Names in the folder of a run, beside the model and Trainer's checkpoints.
ROWS, TEXTS, REPORT = "ghost", "samples.jsonl", "report.html"


@dataclass(frozen=True)
class StoredRun:
    """What a run has written so far: it may still be going on.

    Attributes:
        folder: its output folder.
        rows: scores by step and sample.
        manifest: what they are.
        texts: of the training samples by id, where known.
    """

    folder: Path
    rows: Dataset
    manifest: dict[str, Any]
    texts: dict[int | str, str]

    @classmethod
    def open(cls, output_dir: str | os.PathLike[str], val: str | None = None) -> StoredRun:
        """Reads a run.

        Args:
            output_dir (`str` or `os.PathLike`): of a run, or of a [`GhostDotProdCallback`].
            val (`str`, *optional*): validation set to look at; default all of them.

        Raises:
            ValueError: if there is no run, it has no rows yet, or no such validation set.
        """
        folder = Path(output_dir)
        stores = [store for store in (folder / ROWS, folder) if (store / MANIFEST).exists()]
        if not stores:
            raise ValueError(f"output_dir={str(folder)!r} holds no run. Pass the output folder of one that has begun.")
        store = stores[0]
        rows = load_ghost_dataset(store)
        if len(rows) == 0:
            raise ValueError(f"output_dir={str(folder)!r} has no rows yet. Try again once training has made a step.")
        if val is not None:
            rows = _only(rows, val)
        return cls(folder, rows, read_manifest(store), read_texts(folder / TEXTS))

    def values(self) -> dict[str, GhostValues]:
        """In-run values of the training samples, by validation set."""
        return {name: ghost_values(self.rows, name) for name in validation_set_names(self.rows)}

    def write_report(self, html: str | os.PathLike[str] | None = None, top_k: int = 20) -> Path:
        """Writes the report, to `report.html` in the run's folder unless `html` names a file, and returns its path."""
        return write_report(
            self.rows, html or self.folder / REPORT, manifest=self.manifest, texts=self.texts, top_k=top_k
        )


def _only(rows: Dataset, val: str) -> Dataset:
    """The rows without the columns of other validation sets."""
    names = validation_set_names(rows)
    if val not in names:
        raise ValueError(f"val={val!r} is no validation set of the run. It has {', '.join(names)}.")
    others = tuple(f"/{name}" for name in names if name != val)
    return rows.select_columns([column for column in rows.column_names if not column.endswith(others)])
