"""From text to a folder of token files, in a stream: memory does not grow with the text."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.nanogpt.data.sources import RowSource, Source, open_sources
from hf_gradtools.nanogpt.data.token_folder import DTYPES, META, TokenFolder, smallest_dtype
from hf_gradtools.nanogpt.data.tokenizers import (
    UnknownCharacter,
    batch_encoder,
    byte_tokenizer,
    char_tokenizer,
    ids_end,
    load_tokenizer,
)


__all__ = ["prepare"]

COPIED_BYTES = 1 << 24
UNFINISHED = ".unfinished"
FILES = "files"  # of a dataset, in its meta.json
OLD, NEW = "old", "new"  # in an unfinished folder


def prepare(
    inputs: str | Sequence[str],
    out_dir: str | os.PathLike[str],
    tokenizer: str = "char",
    val_fraction: float = 0.1,
    *,
    val_inputs: str | Sequence[str] | None = None,
    split: str | None = None,
    text_column: str | None = None,
    separator: str | None = None,
    overwrite: bool = False,
) -> TokenFolder:
    """Makes a dataset of token ids: `train.bin`, `val.bin`, `meta.json` and the tokenizer.

    The folder appears when all of it is on the disk. A run that is killed leaves a hidden one beside it, which the
    next for the same `out_dir` removes.

    Args:
        inputs (`str` or `Sequence[str]`): text files; or Hub ids, `.jsonl .json .csv .parquet` files and folders, as
            `datasets` reads them.
        out_dir (`str` or `os.PathLike`): the folder to make.
        tokenizer (`str`, defaults to `"char"`): `"char"` (one id per character of the text, in sorted order), `"byte"`
            (256 ids, takes any file), or a Hub id or folder of a tokenizer, to which a special token spelled in the
            text is that token. A file is encoded in pieces of 262,144 characters and the rest of a line; a tokenizer
            that marks the beginning of a text does so in each.
        val_fraction (`float`, defaults to 0.1): share of the tokens, the last ones, that goes to `val.bin`.
        val_inputs (`str` or `Sequence[str]`, *optional*): a text for `val.bin` of its own, instead of `val_fraction`.
        split (`str`, *optional*): of datasets, default "train".
        text_column (`str`, *optional*): of datasets; default the only one, or "text" or "content".
        separator (`str`, *optional*): put after every row of a dataset, and after each of several files; default the
            tokenizer's end-of-text token, or for rows of characters and bytes a line break.
        overwrite (`bool`, defaults to `False`): replace the folder if there is one; only one that this function made,
            and that holds nothing else, is replaced.

    Returns:
        [`TokenFolder`]: what was made.

    Raises:
        ValueError: an argument is out of range, the folder exists, an input cannot be read, is too short, or has a
            character that a given character tokenizer has not.
    """
    out_dir = Path(out_dir).expanduser()
    if not 0 < val_fraction < 1 and val_inputs is None:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1, or pass val_inputs.")
    _check_free(out_dir, overwrite)
    options = {"split": split, "text_column": text_column, "any_bytes": tokenizer == "byte"}
    train = open_sources(inputs, **options)
    val = [] if val_inputs is None else open_sources(val_inputs, **options)
    made = _make_tokenizer(tokenizer, [*train, *val], separator)
    writer = _TokenWriter(made, separator)
    with _new_folder(out_dir, overwrite) as folder:
        counts = {"train": writer.write(train, folder / "train.bin")}
        if val:
            counts["val"] = writer.write(val, folder / "val.bin")
        else:
            counts = _cut_off_tail(folder, counts["train"], val_fraction, writer.dtype.itemsize)
        if 0 in counts.values():
            raise ValueError(
                f"{counts['train']} tokens for training and {counts['val']} for validation; both need some. Pass more "
                f"text or another val_fraction than {val_fraction}."
            )
        made.save_pretrained(folder)
        files = sorted([META, *os.listdir(folder)])
        write_json_atomically(folder / META, {**_meta(tokenizer, made, writer.dtype, counts), FILES: files})
    return TokenFolder(out_dir.absolute())  # a bare name may be that of the ready dataset


def _meta(
    name: str, tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], counts: dict[str, int]
) -> dict[str, Any]:
    return {
        "dtype": dtype.name,
        "vocab_size": ids_end(tokenizer),
        "tokenizer": Path(name).name if Path(name).is_dir() else name,  # a folder's place is no matter of the data
        "train_tokens": counts["train"],
        "val_tokens": counts["val"],
    }


def _make_tokenizer(name: str, sources: Sequence[Source], separator: str | None) -> PreTrainedTokenizerBase:
    if name == "byte":
        return byte_tokenizer()
    if name != "char":
        return load_tokenizer(name)
    characters = set(_default_separator(None, sources) if separator is None else separator)
    for source in sources:
        for batch in source.batches("Reading"):
            characters.update(*(piece.text for piece in batch))
    return char_tokenizer(characters)


def _default_separator(tokenizer: PreTrainedTokenizerBase | None, sources: Sequence[Source]) -> str:
    """What ends a document: nothing after files of a tokenizer without an end of text, which are parts of one."""
    if tokenizer is not None and tokenizer.eos_token is not None:
        return str(tokenizer.eos_token) if len(sources) > 1 or isinstance(sources[0], RowSource) else ""
    return "\n" if any(isinstance(source, RowSource) for source in sources) else ""


class _TokenWriter:
    """Encodes texts into a file of ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str | None):
        self.tokenizer, self.separator = tokenizer, separator
        self.encode = batch_encoder(tokenizer)
        self.dtype = DTYPES[smallest_dtype(ids_end(tokenizer))]

    def write(self, sources: Sequence[Source], path: Path) -> int:
        """Writes the ids of texts; returns how many there are."""
        separator = _default_separator(self.tokenizer, sources) if self.separator is None else self.separator
        ending = self._encode_separator(separator).astype(self.dtype)
        count = 0
        with open(path, "wb") as file:
            for source in sources:
                for batch in source.batches("Encoding"):
                    for piece, ids in zip(batch, self._encode(batch), strict=True):
                        ids.astype(self.dtype).tofile(file)
                        count += len(ids)
                        if piece.ends and len(ending):
                            ending.tofile(file)
                            count += len(ending)
            _sync(file)
        return count

    def _encode_separator(self, separator: str) -> np.ndarray:
        try:
            return self.encode([separator])[0]
        except UnknownCharacter as error:
            raise ValueError(f"separator={separator!r}: {error}") from error

    def _encode(self, batch: Sequence[Any]) -> list[np.ndarray]:
        try:
            return self.encode([piece.text for piece in batch])
        except UnknownCharacter as error:
            raise ValueError(
                f"{batch[error.text_index].locate(error.position)} has the character {error.character!r} "
                f"(U+{ord(error.character):04X}), which is none of the {len(self.tokenizer)} of the tokenizer. "
                "Remove it, or pass tokenizer='char', which takes the characters of the text."
            ) from error


def _cut_off_tail(folder: Path, count: int, val_fraction: float, itemsize: int) -> dict[str, int]:
    """Moves the last tokens of `train.bin` to `val.bin`; returns how many each has."""
    kept = int(count * (1 - val_fraction))
    with open(folder / "train.bin", "r+b") as train, open(folder / "val.bin", "wb") as val:
        train.seek(kept * itemsize)
        shutil.copyfileobj(train, val, COPIED_BYTES)
        train.truncate(kept * itemsize)
        _sync(train)
        _sync(val)
    return {"train": kept, "val": count - kept}


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_free(folder: Path, overwrite: bool) -> None:
    """ValueError if there is something at `folder` that is not to be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ValueError(f"out_dir={str(folder)!r} is a file. Pass another folder.")
    if others := sorted(set(os.listdir(folder)) - _files_made(folder)):
        raise ValueError(
            f"out_dir={str(folder)!r} exists and holds {others[0]!r}, which is no part of a dataset made here and is "
            "never replaced. Pass another folder."
        )
    if not overwrite:
        raise ValueError(f"out_dir={str(folder)!r} exists. Pass another folder, or overwrite=True.")


def _files_made(folder: Path) -> set[str]:
    """The files of a dataset that `prepare` made; of any other folder, none."""
    try:
        return set(json.loads((folder / META).read_bytes())[FILES])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


@contextlib.contextmanager
def _new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends, or is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=UNFINISHED, dir=folder.parent))
    try:
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):  # of file systems without locks, which then keep leftovers
                lock.enter_context(_locked(unfinished))
            (unfinished / NEW).mkdir()
            yield unfinished / NEW
            _check_free(folder, overwrite)  # others may have been at work meanwhile
            if folder.exists():
                folder.rename(unfinished / OLD)
            (unfinished / NEW).rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left of the same folder."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-*{UNFINISHED}"):
        # Its maker holds the lock while it lives; a folder is empty until that has it.
        with contextlib.suppress(OSError), _locked(left):
            if any(left.iterdir()):
                shutil.rmtree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process; OSError if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
