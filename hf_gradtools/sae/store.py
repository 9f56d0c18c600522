"""Activations on disk as they are read: memory-mapped, per hookpoint, in the order of the tokens.

A store is a folder, written by [`~hf_gradtools.sae.extraction.extract`]:

    layers.0/             a row store (core/store.py) of the column `activation`: a row of D numbers per token
    layers.1/             each hookpoint can be written, read and verified without the others
    tokens.safetensors    `input_ids` [sequences, context_length], which the rows belong to

bfloat16 is held as uint16. Token t is position `skip_positions + t % tokens_per_sequence` of sequence
`t // tokens_per_sequence`. N = tokens, D = d_in.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_gradtools.core import checksums
from hf_gradtools.core.shards import MANIFEST, SEALED, open_shards, open_table, read_manifest
from hf_gradtools.sae.order import by_layer
from hf_gradtools.sae.tokens_digest import sequences_digest


__all__ = ["ACTIVATION", "DTYPES", "KIND", "TOKENS_FILE", "ActivationStore", "StoredActivations"]

KIND = "activations"
ACTIVATION = "activation"
TOKENS_FILE = "tokens.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class _Pieces:
    """The record batches of one hookpoint: `[n, D]` each, and the tokens up to the end of each."""

    rows: list[Tensor]
    ends: list[int]

    @property
    def num_tokens(self) -> int:
        return self.ends[-1] if self.ends else 0


class ActivationStore:
    """Activations of several hookpoints on disk; open it with `open`.

    It shows the rows that were there when a hookpoint was first read, also while a writer appends.

    Attributes:
        path (`Path`): its folder.
        identities (`dict[str, dict]`): by hookpoint what the rows are: model, dtype, context_length, ...
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        folders = sorted(self.path.glob(f"*/{MANIFEST}"), key=lambda file: by_layer(file.parent.name))
        self.identities: dict[str, dict[str, Any]] = {}
        for folder in folders:
            identity = read_manifest(folder.parent)["identity"]
            if identity.get("kind") == KIND:
                self.identities[identity["hookpoint"]] = identity
        if not self.identities:
            raise ValueError(
                f"path={str(path)!r} holds no activations: no folder of a hookpoint with a {MANIFEST}. "
                "Pass the output_dir of extract()."
            )
        self._pieces: dict[str, _Pieces] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ActivationStore:
        """Opens the store in a folder.

        Raises:
            ValueError: if the folder holds no activations.
        """
        return cls(path)

    @property
    def hookpoints(self) -> list[str]:
        """Those that there are rows of, in the order of the layers."""
        return list(self.identities)

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return int(self._identity(hookpoint)["d_in"])

    def dtype(self, hookpoint: str) -> torch.dtype:
        """Of the activations at a hookpoint."""
        return DTYPES[self._identity(hookpoint)["dtype"]]

    def num_tokens_of(self, hookpoint: str) -> int:
        """Rows of one hookpoint."""
        return self._open(hookpoint).num_tokens

    @property
    def num_tokens(self) -> int:
        """Rows that every hookpoint has."""
        return min(self.num_tokens_of(hookpoint) for hookpoint in self.hookpoints)

    def is_complete(self, hookpoint: str) -> bool:
        """Whether all rows of a hookpoint are there."""
        return self.num_tokens_of(hookpoint) == int(self._identity(hookpoint)["num_tokens"])

    @property
    def complete(self) -> bool:
        """Whether all rows of all hookpoints are there."""
        return all(map(self.is_complete, self.hookpoints))

    @property
    def tokens_per_sequence(self) -> int:
        """Rows that belong to one sequence."""
        identity = next(iter(self.identities.values()))
        return int(identity["context_length"] - identity["skip_positions"])

    def sequences(self) -> Tensor:
        """The token ids of the sequences, `[sequences, context_length]` int64.

        Raises:
            ValueError: if they are not there or not those that the activations are of.
        """
        file = self.path / TOKENS_FILE
        try:
            sequences = load_file(file)["input_ids"].long()
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{file} cannot be read ({error}). Restore it from a copy, or extract again.") from error
        expected = next(iter(self.identities.values()))["sequences"]
        if sequences_digest(sequences) != expected:
            raise ValueError(f"{file} is not what was written. Restore it from a copy, or extract again.")
        return sequences

    def place(self, token: int) -> tuple[int, int]:
        """(sequence, position in it) of a token."""
        sequence, position = divmod(token, self.tokens_per_sequence)
        return sequence, position + next(iter(self.identities.values()))["skip_positions"]

    def read(self, hookpoint: str, start: int = 0, end: int | None = None) -> Tensor:
        """The activations of the tokens from `start` to `end`.

        Args:
            hookpoint (`str`): one of `hookpoints`.
            start (`int`, defaults to 0): first token.
            end (`int`, *optional*): after the last; default all, in memory if they are more than one record batch.

        Returns:
            `Tensor`: `[n, D]` as stored; memory-mapped where the rows lie in one record batch, else copied.

        Raises:
            ValueError: if there are no such rows.
            StoreCorruptError: if the files are damaged so that they cannot be read.
        """
        pieces = self._open(hookpoint)
        end = pieces.num_tokens if end is None else end
        if not 0 <= start <= end <= pieces.num_tokens:
            raise ValueError(
                f"start={start}, end={end} are not within the {pieces.num_tokens} tokens of {hookpoint!r} in order."
            )
        found = []
        number = bisect_right(pieces.ends, start)
        while start < end:
            first = pieces.ends[number] - len(pieces.rows[number])
            found.append(pieces.rows[number][start - first : end - first])
            start, number = pieces.ends[number], number + 1
        if not found:
            return torch.empty(0, self.d_in(hookpoint), dtype=self.dtype(hookpoint))
        return found[0] if len(found) == 1 else torch.cat(found)

    def source(
        self, hookpoints: str | Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> StoredActivations:
        """The activations as [`ShuffledBatches`] takes them.

        Args:
            hookpoints (`str` or `Sequence[str]`, *optional*): which; default all.
            dtype (`torch.dtype`, *optional*): that they are cast to; default as stored.

        Raises:
            ValueError: if one is not there or its extraction was not finished.
        """
        names = [hookpoints] if isinstance(hookpoints, str) else list(hookpoints or self.hookpoints)
        for name in names:
            self._identity(name)
            if not self.is_complete(name):
                raise ValueError(
                    f"hookpoint={name!r} of {self.path} has {self.num_tokens_of(name)} of "
                    f"{self.identities[name]['num_tokens']} tokens. Run its extraction again: it goes on where it was."
                )
        return StoredActivations(self, names, dtype)

    def verify(self) -> int:
        """Reads every byte and compares it with its checksums.

        Returns:
            `int`: bytes that were compared. Rows in progress have no checksums yet.

        Raises:
            StoreCorruptError: names hookpoint, file, bytes and rows of all that differs.
            ValueError: if the token ids are damaged.
        """
        damages: list[checksums.Damage] = []
        num_bytes = 0
        for hookpoint in self.hookpoints:
            try:
                num_bytes += checksums.verify(self.path / hookpoint).bytes
            except checksums.StoreCorruptError as error:
                damages += [replace(damage, file=f"{hookpoint}/{damage.file}") for damage in error.damages]
        if damages:
            raise checksums.StoreCorruptError(self.path, damages)
        self.sequences()
        return num_bytes

    def _identity(self, hookpoint: str) -> dict[str, Any]:
        if hookpoint not in self.identities:
            raise ValueError(f"hookpoint={hookpoint!r} is not in {self.path}. It has {', '.join(self.hookpoints)}.")
        return self.identities[hookpoint]

    def _open(self, hookpoint: str) -> _Pieces:
        width, dtype = self.d_in(hookpoint), self.dtype(hookpoint)
        if hookpoint not in self._pieces:
            folder = self.path / hookpoint
            try:
                shards = open_shards(folder, lambda shard: list(_rows_of(shard, width, dtype)))
            except (ValueError, KeyError, OSError):
                checksums.verify(folder)  # names what is damaged
                raise
            rows = [piece for shard in shards for piece in shard if len(piece)]
            ends = torch.tensor([len(piece) for piece in rows]).cumsum(0).tolist() if rows else []
            self._pieces[hookpoint] = _Pieces(rows, ends)
        return self._pieces[hookpoint]

    def _end_of_piece(self, hookpoint: str, token: int) -> int:
        """Where the record batch of a token ends: reading up to there copies nothing."""
        ends = self._open(hookpoint).ends
        return ends[bisect_right(ends, token)]


class StoredActivations:
    """Some hookpoints of a store as an [`ActivationSource`]; made by [`ActivationStore.source`]."""

    def __init__(self, store: ActivationStore, hookpoints: list[str], dtype: torch.dtype | None) -> None:
        self.store, self.hookpoints = store, hookpoints
        self.dtype = dtype or store.dtype(hookpoints[0])
        self.num_tokens = min(map(store.num_tokens_of, hookpoints))

    def d_in(self, hookpoint: str) -> int:
        """Numbers in an activation at a hookpoint."""
        return self.store.d_in(hookpoint)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.chunks()

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Tensor]]:
        """The activations of the tokens from `start` to `end`, memory-mapped, a record batch at a time.

        Args:
            start (`int`, defaults to 0): first token.
            end (`int`, *optional*): after the last; default all.
        """
        end = self.num_tokens if end is None else end
        while start < end:
            stop = min(end, *(self.store._end_of_piece(hookpoint, start) for hookpoint in self.hookpoints))
            yield {name: self.store.read(name, start, stop).to(self.dtype) for name in self.hookpoints}
            start = stop


def _rows_of(shard: Path, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """`[n, width]` of each record batch of a shard: mapped of a sealed one, a copy of one in progress."""
    if shard.suffix != SEALED:
        for batch in open_table(shard).to_batches():
            yield torch.from_numpy(batch.column(ACTIVATION).flatten().to_numpy().copy()).view(dtype).view(-1, width)
        return
    with open(shard, "rb") as file:
        # A private mapping: torch takes no memory that is read-only.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    whole = pa.py_buffer(mapping)
    for batch in pa.ipc.open_stream(whole):
        values = batch.column(ACTIVATION).values
        start = values.buffers()[1].address - whole.address + values.offset * dtype.itemsize
        yield torch.frombuffer(mapping, dtype=dtype, count=len(values), offset=start).view(-1, width)
