"""How a training run takes up the rows that an earlier part of it has written."""

from __future__ import annotations

import logging
import os
from typing import Protocol


logger = logging.getLogger(__name__)


class StepRows(Protocol):
    """A writer of rows with a column `step`."""

    complete: bool
    num_rows: int

    def truncate(self, column: str, maximum: float) -> int:
        """Drops rows."""

    def close(self) -> None:
        """Lets go of the file in progress."""


def take_up_rows(
    store: StepRows, output_dir: str | os.PathLike[str], global_step: int, overwrite: bool | None = None
) -> None:
    """Drops the rows of steps that training makes again.

    Args:
        store: of this rank, just opened.
        output_dir: its folder, for the messages.
        global_step: where training starts; the rows of a finished run are refused at 0.
        overwrite: drop these instead; None where the user has no such option.

    Raises:
        ValueError: they are of a finished run.
    """
    folder = os.fspath(output_dir)
    if store.complete and store.num_rows and global_step == 0 and not overwrite:
        store.close()
        offer = "" if overwrite is None else ", or pass overwrite_output_dir=True"
        raise ValueError(
            f"output_dir={folder!r} holds the {store.num_rows} rows of a finished run; choose another folder, resume "
            f"the run by trainer.train(resume_from_checkpoint=True){offer}"
        )
    dropped = store.truncate("step", global_step) if store.num_rows else 0
    if dropped:
        logger.warning(
            "%d rows in %s are of steps after %d, which training makes again; they were dropped",
            dropped,
            folder,
            global_step,
        )
