"""Writes gradients of samples to a store, one row each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ...core.store import RowStore
from .streaming import DTYPES, GRADIENT


if TYPE_CHECKING:
    from typing_extensions import Self


KIND = "gradient_projections"
SAMPLE_ID = "sample_id"
SHARD_BYTES = 256 * 10**6
OTHER_BYTES = 64  # of a row's other columns, about
LOST_SHARE = 1e-2  # of a row's norm


class GradientWriter:
    """The one writer of one rank's gradients, on the crash-safe [`~hf_gradtools.core.store.RowStore`].

    Args:
        path: folder of the store; created if absent, continued if it is there.
        identity: JSON values that say what the gradients are; `kind`, `dim` and `dtype` are added. What `"dataset"`
            holds tells stores apart when they are written, but not when their gradients are compared.
        dim: numbers in a gradient.
        dtype: `"float16"`, `"float32"` or `"bfloat16"` of the stored numbers.
        extra: JSON values that may differ later; a [`GradientEnsemble`] looks for `"learning_rate"` here.
        rank: of this process.
        rows_per_shard: default as many as make 256 MB.

    Raises:
        StoreMismatchError: the folder holds gradients of another identity.
        ValueError: `dim` or `dtype` is impossible, or `identity` says otherwise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        dim: int,
        dtype: str = "float16",
        extra: dict[str, Any] | None = None,
        rank: int = 0,
        rows_per_shard: int | None = None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim}; a gradient needs at least 1 number.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown. Pass one of {', '.join(DTYPES)}.")
        added = {"kind": KIND, "dim": dim, "dtype": dtype}
        if differing := {key: identity[key] for key in added if identity.get(key, added[key]) != added[key]}:
            raise ValueError(f"identity holds {differing}, the writer was given {added}. Leave these keys out.")
        self.dim, self.dtype = dim, dtype
        self._dtype = DTYPES[dtype]
        self._warned = False
        row_bytes = dim * self._dtype.itemsize + OTHER_BYTES
        rows = rows_per_shard or max(1, SHARD_BYTES // row_bytes)
        self._store = RowStore(path, {**added, **identity}, extra=extra, rank=rank, rows_per_shard=rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self._store.path

    @property
    def num_rows(self) -> int:
        """Rows of this rank, those of earlier runs included: where a resumed run goes on."""
        return self._store.num_rows

    @property
    def complete(self) -> bool:
        """Whether the store was marked complete when it was opened."""
        return self._store.complete

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds rows; once this returns a kill of the process cannot lose them.

        Args:
            columns: `"sample_id"` and `"gradient"` `[n, dim]` float32, and any others of length n. The first append
                fixes names and types.

        Raises:
            ValueError: a column is missing or of another length, a number is not finite or too large for the dtype.
        """
        if missing := {SAMPLE_ID, GRADIENT} - set(columns):
            raise ValueError(f"columns lack {sorted(missing)}; each row needs {SAMPLE_ID!r} and {GRADIENT!r}.")
        gradient = torch.as_tensor(columns[GRADIENT]).detach().cpu()
        if gradient.ndim != 2 or gradient.shape[1] != self.dim:
            raise ValueError(
                f"columns['gradient'] has shape {tuple(gradient.shape)}; it needs [rows, dim={self.dim}]."
            )
        others = {name: _plain(values) for name, values in columns.items() if name != GRADIENT}
        if wrong := {name: len(values) for name, values in others.items() if len(values) != len(gradient)}:
            raise ValueError(f"columns have other lengths than the {len(gradient)} rows of 'gradient': {wrong}.")
        stored = self._cast(gradient, others[SAMPLE_ID])
        self._store.append({**others, GRADIENT: self._as_arrow(stored)})

    def seal(self) -> None:
        """Turns the rows in progress into a shard with checksums, without marking the store complete."""
        self._store.seal()

    def truncate(self, column: str, maximum: float) -> int:
        """Drops this rank's rows whose value in `column` exceeds `maximum`, see `RowStore.truncate`."""
        return self._store.truncate(column, maximum)

    def finish(self) -> None:
        """Seals, and on rank 0 marks the store complete: call it there last, after the other ranks."""
        self._store.finish()

    def close(self) -> None:
        """Closes the file in progress. A later append opens it again."""
        self._store.close()

    def _cast(self, gradient: Tensor, sample_ids: Any) -> Tensor:
        stored = gradient.to(self._dtype)
        norms, kept = (torch.linalg.vector_norm(x.float(), dim=1) for x in (gradient, stored))
        if not torch.isfinite(norms + kept).all():  # or the squares of finite numbers were too large
            self._check_finite(gradient, stored, sample_ids)
        elif self._dtype == torch.float16 and not self._warned:
            self._warn_of_underflow(norms, kept, sample_ids)
        return stored

    def _check_finite(self, gradient: Tensor, stored: Tensor, sample_ids: Any) -> None:
        finite, fits = (torch.isfinite(x).all(dim=1) for x in (gradient, stored))
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise ValueError(
                f"the gradient of sample_id={sample_ids[first]!r} is not finite. Find out why its loss or the model's "
                "weights are not, or leave the sample out."
            )
        if not fits.all():
            first = int((~fits).nonzero()[0])
            raise ValueError(
                f"the gradient of sample_id={sample_ids[first]!r} reaches {gradient[first].abs().max():.4g}, too "
                f"large for {self.dtype}. Pass dtype='bfloat16' or 'float32'."
            )

    def _warn_of_underflow(self, norms: Tensor, kept: Tensor, sample_ids: Any) -> None:
        lost = (norms - kept).abs() > LOST_SHARE * norms
        if lost.any():
            first = int(lost.nonzero()[0])
            self._warned = True
            warnings.warn(
                f"the gradient of sample_id={sample_ids[first]!r} has norm {norms[first]:.3g}, of which float16 loses "
                "more than 1 %: its numbers are too small. Pass dtype='bfloat16' or 'float32' to keep such rows.",
                stacklevel=4,
            )

    def _as_arrow(self, stored: Tensor) -> pa.Array:
        bits = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored  # Arrow has no bfloat16
        return pa.FixedSizeListArray.from_arrays(pa.array(bits.contiguous().view(-1).numpy()), self.dim)


def _plain(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return values if isinstance(values, (list, tuple, pa.Array, pa.ChunkedArray)) else np.asarray(values)
