"""A folder of token files, ours or nanoGPT's: `train.bin`, `val.bin`, what they hold, and the tokenizer."""

from __future__ import annotations

import json
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_gradtools.nanogpt.data.blocks import TokenBlocks
from hf_gradtools.nanogpt.data.legacy import read_meta_pickle
from hf_gradtools.nanogpt.data.tokenizers import char_tokenizer, load_tokenizer


__all__ = ["DTYPES", "META", "TokenFolder", "smallest_dtype"]

logger = logging.get_logger(__name__)

META = "meta.json"
META_PICKLE = "meta.pkl"
READY = "shakespeare_char"
SPLITS = ("train", "val")
DTYPES = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS = 1 << 20  # tokens of which a fingerprint is made
UINT16_IDS = 1 << 16
SCANNED_BYTES = 1 << 30  # of a split, when its ids are checked


def smallest_dtype(vocab_size: int) -> str:
    """The narrowest type of `DTYPES` that holds ids below `vocab_size`."""
    for name, dtype in DTYPES.items():
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return name
    raise ValueError(f"vocab_size={vocab_size:,} is more than files of 32-bit ids can hold. Correct it.")


class TokenFolder:
    """A dataset of token ids.

    Args:
        path (`str` or `os.PathLike`): a folder that `prepare` or nanoGPT's `prepare.py` made, or its name under
            `data/`; `"shakespeare_char"` is a set that is made of a text in this package.
        dtype (`str`, *optional*): `uint8`, `uint16` or `uint32`, of the files in a folder that does not say so;
            default what `meta.json` says; beside a `meta.pkl` uint16, or uint32 where the
            vocabulary is too large for it.
        vocab_size (`int`, *optional*): for a folder that does not say so; default the largest id and one.

    Attributes:
        path (`Path`): the folder.
        dtype (`np.dtype`): of the files.
        vocab_size (`int`): all ids are below it.
        meta (`dict`): what `meta.json` or `meta.pkl` says.

    Raises:
        ValueError: there is no such folder, its files are broken, or it does not say what they hold.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: str | None = None, vocab_size: int | None = None):
        self.path = _find(path)
        self.meta = _read_meta(self.path)
        self.dtype = self._choose_dtype(dtype)
        self._splits: dict[str, np.ndarray] = {}
        self.vocab_size = self._choose_vocab_size(vocab_size)

    def tokens(self, split: str) -> np.memmap:
        """All ids of `"train"` or `"val"`, mapped from the disk.

        Raises:
            ValueError: there is no such split, or its file is empty or cut off.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown. Pass one of {', '.join(SPLITS)}.")
        if split not in self._splits:
            self._splits[split] = self._map(split)
        return self._splits[split]

    def blocks(self, split: str, block_size: int, seed: int = 0, length: int | None = None) -> TokenBlocks:
        """Blocks at random offsets as nanoGPT's (x, y) pairs: a map-style dataset of `input_ids`, `shift_labels`.

        Args:
            split (`str`): `"train"` or `"val"`.
            block_size (`int`): tokens in a block.
            seed (`int`, defaults to 0): of the offsets.
            length (`int`, *optional*): how many; default as many as fit side by side.

        Raises:
            ValueError: the split has fewer than `block_size + 1` tokens.
        """
        try:
            return TokenBlocks(self.tokens(split), block_size, seed, length)
        except ValueError as error:
            raise ValueError(f"{split}.bin in {self.path}: {error}") from error

    def check_ids(self, vocab_size: int | None = None) -> None:
        """ValueError if a file holds ids that the vocabulary has not; of files above 1 GiB, a share is looked at."""
        limit = self.vocab_size if vocab_size is None else vocab_size
        for split in SPLITS:
            if limit <= np.iinfo(self.dtype).max and (largest := _largest(self.tokens(split))) >= limit:
                raise ValueError(
                    f"{split}.bin in {self.path} has id {largest}, and the vocabulary ends at {limit - 1}. It was "
                    f"read as {self.dtype.name}: pass the dtype it was written with, or prepare the data anew."
                )

    def fingerprint(self) -> str:
        """Changes with the data: made of the length, the beginning and the end of each file, and the type of ids."""
        parts = [self.dtype.name, str(self.vocab_size)]
        for split in SPLITS:
            tokens = self.tokens(split)
            parts += [str(len(tokens)), *(f"{zlib.crc32(part):08x}" for part in (tokens[:ENDS], tokens[-ENDS:]))]
        return "-".join(parts)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the ids mean: the tokenizer saved in the folder, or one made of `meta.pkl`.

        Raises:
            ValueError: the folder has neither.
        """
        if (self.path / "tokenizer_config.json").is_file():
            return load_tokenizer(str(self.path))
        if self._characters is not None:
            return self._characters
        raise ValueError(
            f"{self.path} has no tokenizer. Save the one that made the ids there: tokenizer.save_pretrained(folder)."
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder says what the ids mean."""
        return (self.path / "tokenizer_config.json").is_file() or self._characters is not None

    @cached_property
    def _characters(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of a `meta.pkl` whose tokens are characters."""
        if not isinstance(stoi := self.meta.get("stoi"), dict):
            return None
        try:
            return char_tokenizer(stoi)
        except (TypeError, ValueError) as error:
            logger.warning_once(f"{self.path / META_PICKLE} makes no tokenizer: {error}")
            return None

    def _choose_dtype(self, given: str | None) -> np.dtype[Any]:
        known = self.meta.get("dtype") or self._dtype_of_nanogpt()
        if given is not None and self.meta.get("dtype") not in (None, given):
            raise ValueError(f"dtype={given!r}, but {self.path / META} says {known!r}. Leave dtype out.")
        name = given or known
        if name is None:
            raise ValueError(
                f"{self.path} has no {META} or {META_PICKLE} that says how wide the numbers in its files are. "
                "Pass dtype='uint16' for GPT-2 tokens as nanoGPT writes them."
            )
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r} is unknown. Pass one of {', '.join(DTYPES)}.")
        return DTYPES[name]

    def _dtype_of_nanogpt(self) -> str | None:
        """What nanoGPT writes beside a `meta.pkl`, which does not say so: uint16, unless an id may be larger."""
        return smallest_dtype(max(self.meta["vocab_size"], UINT16_IDS)) if "vocab_size" in self.meta else None

    def _choose_vocab_size(self, given: int | None) -> int:
        known = self.meta.get("vocab_size")
        if known is not None and given not in (None, known):
            raise ValueError(f"vocab_size={given}, but the data in {self.path} has {known}. Leave vocab_size out.")
        size = given or known
        return size if size is not None else 1 + max(_largest(self.tokens(split)) for split in SPLITS)

    def _map(self, split: str) -> np.memmap:
        path = self.path / f"{split}.bin"
        if not path.is_file():
            raise ValueError(f"{self.path} has no {split}.bin. Make it: hf-gradtools nanogpt prepare.")
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes, which are no whole number of {self.dtype.name} above 0: it is cut off, or "
                "of another dtype. Prepare the data anew."
            )
        expected = self.meta.get(f"{split}_tokens")
        if expected is not None and size // self.dtype.itemsize != expected:
            found = size // self.dtype.itemsize
            raise ValueError(f"{path} has {found:,} tokens, and {META} says {expected:,}. Prepare the data anew.")
        return np.memmap(path, self.dtype, "r")


def _find(path: str | os.PathLike[str]) -> Path:
    if os.fspath(path) == READY:
        from hf_gradtools.nanogpt.data.shakespeare import shakespeare_char

        return shakespeare_char()
    folder = Path(path).expanduser()
    for candidate in (folder, Path("data") / folder):
        if (candidate / "train.bin").is_file():
            return candidate
    what = "has no train.bin" if folder.is_dir() else "is no folder here or in data/"
    raise ValueError(
        f"dataset={os.fspath(path)!r} {what}. Pass {READY!r}, or a folder made by hf-gradtools nanogpt prepare."
    )


def _read_meta(folder: Path) -> dict[str, Any]:
    if (folder / META).is_file():
        try:
            meta = json.loads((folder / META).read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder / META} is no JSON: {error}. Prepare the data anew.") from error
        if not isinstance(meta, dict) or not isinstance(meta.get("vocab_size", 1), int):
            raise ValueError(f"{folder / META} is no mapping with a whole vocab_size. Prepare the data anew.")
        return meta
    if (folder / META_PICKLE).is_file():
        return read_meta_pickle(folder / META_PICKLE)
    return {}


def _largest(tokens: np.ndarray) -> int:
    """The largest id; of a very long file, that of parts spread evenly over it."""
    tokens = np.asarray(tokens)
    part = 1 << 22
    starts = range(0, len(tokens), part)
    step = max(-(-tokens.nbytes // SCANNED_BYTES), 1)
    if step > 1:
        logger.info(f"ids are checked in every {step}th part of {tokens.nbytes:,} bytes")
    return max(int(tokens[start : start + part].max()) for start in starts[::step])
