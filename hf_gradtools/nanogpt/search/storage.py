"""The Optuna study that keeps the runs of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


__all__ = ["import_optuna", "open_study"]

STUDY = "runs"
JOURNAL = "journal.log"
LOCK_SECONDS = 10  # after which the lock of a writer that was killed is broken; a record is written in milliseconds


def import_optuna() -> Any:
    """Optuna, or ImportError that names the extra."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("Sweeps and searches stand on Optuna: pip install 'hf_gradtools[sweep]'") from error
    return optuna


def open_study(folder: Path, storage: Any = None) -> Any:
    """The study of a folder, made if there is none.

    Args:
        folder (`Path`): holds the journal.
        storage (`str` or `optuna.storages.BaseStorage`, *optional*): another storage or its URL; default a journal
            in `folder`, which any number of processes and machines that share the folder may write. In another
            storage the study has the folder's name, since other folders may use it too.

    Returns:
        `optuna.Study`: of values to be minimised.
    """
    optuna = import_optuna()
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study that is opened
    try:
        return optuna.create_study(
            storage=_journal(folder) if storage is None else storage,
            study_name=STUDY if storage is None else f"{STUDY} of {folder.absolute().name}",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: all that runs is enqueued
        )
    finally:
        optuna.logging.set_verbosity(verbosity)


def _journal(folder: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class MendingLock(JournalFileOpenLock):
        """Cuts off, before anything is appended, the half of a record that a killed process left.

        Such a half was never acknowledged; with a record behind it the journal could not be read any more.
        """

        def acquire(self) -> bool:
            acquired = super().acquire()
            _cut_unfinished_line(path)
            return acquired

    folder.mkdir(parents=True, exist_ok=True)
    path = str((folder / JOURNAL).absolute())
    return JournalStorage(JournalFileBackend(path, lock_obj=MendingLock(path, grace_period=LOCK_SECONDS)))


def _cut_unfinished_line(path: str) -> None:
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
