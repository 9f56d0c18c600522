"""A store of gradients as it is read: streamed, searched, verified, saved and pushed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ...core import checksums
from ...core.atomic import atomic_write
from ...core.shards import (
    MANIFEST,
    SEALED,
    StoreMismatchError,
    as_json,
    differences,
    open_shards,
    read_dataset,
    read_manifest,
)
from .fitting import BASES_FILE, check_bases
from .precondition import damped_cholesky, fisher_matrix
from .search import Searchable
from .streaming import GRADIENT, column_of, iter_blocks, list_layout, read_rows
from .writer import KIND, SAMPLE_ID, GradientWriter


if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import DatasetCard
    from typing_extensions import Self

__all__ = ["GradientStore", "GradientWriter", "Projector"]

FISHER = "fisher.safetensors"
# Of the identity: which rows were projected and how they were cut, not what their numbers mean.
ABOUT_ROWS = ("kind", "dim", "dtype", "dataset", "dataset_rows", "world_size", "window_rows")
BLOCK_BYTES = 4 * 2**20


class Projector(Protocol):
    """What makes gradients that compare with a store's."""

    def identity(self) -> dict[str, Any]:
        """JSON values that say what the gradients are."""

    def adopt(self, store: str | os.PathLike[str]) -> None:
        """Takes what was fitted for the store in a folder, if it has fitted nothing itself."""

    def gradients(self, rows: Any, optimizer_aware: bool = False) -> Tensor:
        """The gradients of tokenized rows, `[Q, dim]` float32."""


class GradientStore(Searchable):
    """Gradients of samples on disk, one row each, in the dataset's order; open it with `open` or `from_pretrained`.

    It shows the rows that were there when it was opened, also while a writer appends.

    Attributes:
        path: its folder.
        identity: what the gradients are.
        extra: what else was recorded: the library's version, the model's name, a learning rate.
        dim: numbers in a gradient.
        complete: whether all rows are there.
        projector: that it is bound to, or `None`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.identity: dict[str, Any] = manifest["identity"]
        if self.identity.get("kind") != KIND:
            raise ValueError(
                f"path={str(path)!r} is a store of {self.identity.get('kind')!r}, not of {KIND!r}. "
                "Pass the output_dir of GradProjector.project."
            )
        self.extra: dict[str, Any] = manifest["extra"]
        self.complete: bool = manifest["complete"]
        self.dim: int = self.identity["dim"]
        self.projector: Projector | None = None
        self.indexes: dict[tuple[Any, ...], Any] = {}  # of FAISS
        self._layout = list_layout(self.path, self.dim, self.identity["dtype"])
        self._check_shards(manifest.get("shards", {}))
        self._fisher: Tensor | None = None
        self._sample_ids: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Opens the store in a folder.

        Raises:
            ValueError: the folder holds no store of gradients.
        """
        return cls(path)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> Self:
        """Opens a store in a folder, or downloads one that was pushed.

        Args:
            path_or_hub_id: a folder, or the id of a dataset on the Hub.
            revision: branch, tag or commit on the Hub.
            token: for private ones.
        """
        if Path(path_or_hub_id).is_dir():
            return cls(path_or_hub_id)
        from hf_gradtools.hub import is_hub_id

        if not is_hub_id(str(path_or_hub_id)):
            raise ValueError(
                f"{str(path_or_hub_id)!r} is neither a folder nor an id of the Hub, such as 'user/store'."
            )
        from huggingface_hub import snapshot_download

        return cls(snapshot_download(str(path_or_hub_id), repo_type="dataset", revision=revision, token=token))

    # ---- what it holds

    def _check_shards(self, counts: Mapping[str, int]) -> None:
        """Holds the shards against what the manifest of a complete store says of them."""
        there = {shard.path.name: shard.num_rows for shard in self._layout.shards}
        if lost := [name for name, rows in counts.items() if there.get(name, 0) != rows]:
            raise checksums.StoreCorruptError(
                self.path, [checksums.Damage(name, "is missing or has lost rows", (0, 0)) for name in lost]
            )

    @property
    def stores(self) -> list[GradientStore]:
        """Itself."""
        return [self]

    @property
    def weights(self) -> list[float]:
        """One."""
        return [1.0]

    def __len__(self) -> int:
        return self._layout.num_rows

    @property
    def dtype(self) -> str:
        """Of the stored numbers."""
        return str(self.identity["dtype"])

    @property
    def sample_ids(self) -> np.ndarray:
        """`[N]` by row."""
        if self._sample_ids is None:
            self._sample_ids = self.column(SAMPLE_ID)
        return self._sample_ids

    @property
    def column_names(self) -> list[str]:
        """Columns beside the gradient."""
        names = self._layout.shards[0].table().column_names if self._layout.shards else []
        return [name for name in names if name != GRADIENT]

    def column(self, name: str) -> np.ndarray:
        """A column beside the gradient, `[N]` in memory.

        Raises:
            ValueError: there is none of this name.
        """
        if self._layout.shards and name not in self.column_names:
            raise ValueError(f"name={name!r} is not a column of {self.path}. Pass one of {self.column_names}.")
        return column_of(self._layout.shards, name)

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Streams all gradients: the store is never in memory, nor do mapped pages pile up.

        Args:
            max_bytes: of a block in float32, which has at least one row.

        Yields:
            (first row, `[n, dim]` float32), valid until the next block is asked for: clone what shall stay.
        """
        return iter_blocks(self._layout, max(1, max_bytes // (4 * self.dim)))

    def rows(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The gradients of some rows, `[len(indices), dim]` float32 in their order.

        Raises:
            IndexError: a row is negative or beyond the last.
        """
        wanted = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        if len(wanted) and not (int(wanted.min()) >= 0 and int(wanted.max()) < len(self)):
            raise IndexError(
                f"indices reach from {wanted.min()} to {wanted.max()}; the store has rows 0 to {len(self) - 1}."
            )
        return read_rows(self._layout, wanted)

    def to_dataset(self) -> Dataset:
        """All columns as a memory-mapped `datasets.Dataset`.

        Arrow has no bfloat16: such gradients are int16 bits, and read as float32 until another format is set.
        """
        dataset = read_dataset(self.path)
        return dataset if self.dtype != "bfloat16" else dataset.with_transform(_from_bfloat16)

    def info(self) -> dict[str, Any]:
        """What the store is: sizes in bytes, model, layers, projection."""
        files = open_shards(self.path, lambda shard: shard.stat().st_size)
        layers = self.identity.get("layers")
        described = {"model", "layers", "ranks", *ABOUT_ROWS}
        return {
            "rows": len(self),
            "dim": self.dim,
            "dtype": self.dtype,
            "complete": self.complete,
            "shards": len(files),
            "bytes": sum(files),
            "bytes_per_sample": sum(files) / len(self) if len(self) else 0.0,
            "columns": [GRADIENT, *self.column_names],
            "model": self.extra.get("model") or self.identity.get("model"),
            "layers": len(layers) if isinstance(layers, list) else layers,
            "projection": {key: value for key, value in self.identity.items() if key not in described},
            "extra": self.extra,
        }

    def verify(self, progress: bool = True) -> checksums.Verified:
        """Reads every byte and compares it with its checksum.

        Returns:
            what was compared, and what has no checksums.

        Raises:
            StoreCorruptError: names file, bytes and rows of all that differs, is cut or is missing.
        """
        total = sum(open_shards(self.path, lambda shard: shard.stat().st_size))
        with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=not progress, delay=1) as bar:
            report = checksums.verify(self.path, bar.update)
        check_bases(self.path, self.identity.get("bases"))
        return report

    # ---- what it compares with

    def bind(self, projector: Projector) -> Self:
        """Takes the projector that searches by rows use.

        Returns:
            the store itself.

        Raises:
            StoreMismatchError: the projector makes other gradients than the store has.
        """
        projector.adopt(self.path)
        self.check_comparable(projector.identity(), "the projector")
        self.projector = projector
        return self

    def check_comparable(self, identity: Mapping[str, Any], whose: str) -> None:
        """Raises StoreMismatchError if gradients of another identity do not compare with these.

        Args:
            identity: of the others.
            whose: in words, for the error.
        """
        given = as_json(dict(identity))
        sizes = {key: given[key] for key in ("kind", "dim") if key in given}
        stored, given = ({k: v for k, v in x.items() if k not in ABOUT_ROWS} for x in (self.identity, given))
        stored.update({key: self.identity[key] for key in sizes})
        if differing := differences(stored, {**given, **sizes}):
            raise StoreMismatchError(
                f"the store {self.path} does not compare with {whose}: {differing}. "
                "Pass gradients that the same model and options made."
            )

    def fisher_factor(self, damping: float, progress: bool = True) -> Tensor:
        """The Cholesky factor `[dim, dim]` of the damped Fisher matrix of all rows, which is kept beside them."""
        if self._fisher is None:
            fingerprint = self._rows_fingerprint()
            self._fisher = self._load_fisher(fingerprint)
            if self._fisher is None:
                self._fisher = fisher_matrix(self._watched_blocks("Fisher matrix", progress), self.dim)
                self._save_fisher(self._fisher, fingerprint)
        return damped_cholesky(self._fisher, damping)

    def _watched_blocks(self, what: str, progress: bool) -> Iterator[tuple[int, Tensor]]:
        with tqdm(total=len(self), desc=what, unit="row", unit_scale=True, disable=not progress, delay=1) as bar:
            for first, block in self.blocks():
                yield first, block
                bar.update(len(block))

    def _rows_fingerprint(self) -> str | None:
        """Changes with any row; `None` while rows are in progress."""
        shards = []
        for shard in self._layout.shards:
            if shard.path.suffix != SEALED:
                return None
            status = shard.path.stat()
            known = checksums.versions_of(shard.path) or [status.st_size, status.st_mtime_ns]
            shards.append([shard.path.name, shard.num_rows, known])
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def _load_fisher(self, fingerprint: str | None) -> Tensor | None:
        if fingerprint is None:
            return None
        with suppress(OSError, SafetensorError), safe_open(self.path / FISHER, framework="pt") as file:
            fisher = file.get_tensor("fisher")
            if (file.metadata() or {}) == {"rows": fingerprint, "sha256": _digest(fisher)}:
                return fisher
        return None

    def _save_fisher(self, fisher: Tensor, fingerprint: str | None) -> None:
        if fingerprint is None:
            return
        content = save({"fisher": fisher}, metadata={"rows": fingerprint, "sha256": _digest(fisher)})
        with suppress(OSError), atomic_write(self.path / FISHER, tmp_suffix=f".{os.getpid()}.tmp") as file:
            file.write(content)  # a folder that cannot be written to does without

    # ---- elsewhere

    def save_pretrained(self, folder: str | os.PathLike[str], **metadata: Any) -> None:
        """Copies the store to a folder, with a dataset card.

        Args:
            folder: made if absent; must hold no other store.
            **metadata: of [`~huggingface_hub.DatasetCardData`], such as `license`.

        Raises:
            ValueError: rows are in progress, or the folder holds a store.
        """
        files, target = self._files(), Path(folder)
        if (target / MANIFEST).exists() or any(target.glob("shard-*")):
            raise ValueError(f"folder={str(folder)!r} holds a store already; pass another, or delete that one.")
        target.mkdir(parents=True, exist_ok=True)
        for file in files:  # the manifest last: without it there is no store
            with atomic_write(target / file.name) as copy, open(file, "rb") as source:
                shutil.copyfileobj(source, copy, 2**20)
        self.write_card(target, **metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload gradients",
        create_pr: bool = False,
        **metadata: Any,
    ) -> str:
        """Uploads the store as a dataset, with a card; shards of an earlier store in the repository are removed.

        Args:
            repo_id: made if absent.
            private, token, revision, commit_message, create_pr: as in `huggingface_hub`.
            **metadata: of [`~huggingface_hub.DatasetCardData`], such as `license`.

        Returns:
            the address of the commit.

        Raises:
            ValueError: rows are in progress.
        """
        from .card import push_store

        return push_store(
            self, self._files(), repo_id, private=private, token=token, revision=revision,
            commit_message=commit_message, create_pr=create_pr, metadata=metadata,
        )  # fmt: skip

    def write_card(self, folder: str | os.PathLike[str], repo_id: str | None = None, **metadata: Any) -> DatasetCard:
        """Writes the dataset card, `README.md`, and returns it."""
        from .card import write_store_card

        return write_store_card(folder, self, repo_id, **metadata)

    def _files(self) -> list[Path]:
        """What makes up the store, the manifest last."""
        if growing := [shard.path.name for shard in self._layout.shards if shard.path.suffix != SEALED]:
            raise ValueError(
                f"rows of {self.path} are still in progress ({', '.join(growing)}); finish it and open it again."
            )
        shards = [shard.path for shard in self._layout.shards]
        sidecars = [checksums.sidecar_of(shard) for shard in shards]
        fitted = [self.path / BASES_FILE]
        return [file for file in [*sidecars, *shards, *fitted, self.path / MANIFEST] if file.exists()]


def _from_bfloat16(batch: dict[str, Any]) -> dict[str, Any]:
    if GRADIENT not in batch:
        return batch
    bits = np.asarray(batch[GRADIENT], dtype=np.int16)
    return {**batch, GRADIENT: torch.from_numpy(bits).view(torch.bfloat16).float().numpy()}


def _digest(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
