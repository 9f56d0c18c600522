"""Writes activations to a store: one forward for all hookpoints, killed and resumed at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from hf_gradtools import __version__
from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.core.store import RowStore, StoreMismatchError
from hf_gradtools.sae.store import ACTIVATION, DTYPES, KIND, TOKENS_FILE, ActivationStore
from hf_gradtools.sae.streaming import ModelActivations
from hf_gradtools.sae.tokens_digest import sequences_digest


if TYPE_CHECKING:
    from transformers import PreTrainedModel


__all__ = ["extract"]

SHARD_BYTES = 256 * 10**6
SAMPLED_VALUES = 256  # of every weight: enough to tell checkpoints apart, nothing to wait for


def extract(
    model: PreTrainedModel,
    sequences: Tensor,
    hookpoints: Sequence[str],
    output_dir: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    skip_positions: int = 1,
    model_name: str | None = None,
    tokenizer_name: str | None = None,
    corpus: Mapping[str, Any] | None = None,
    rows_per_shard: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> ActivationStore:
    """Writes the activations of all tokens at some hookpoints to a folder, or goes on where a killed run was.

    Sealed files are, byte for byte, those of a run that nobody killed. Processes may write different hookpoints to
    the same folder at the same time. Disk: tokens × sum of d_in × bytes of the dtype.

    Args:
        model (`PreTrainedModel`): a causal LM.
        sequences (`Tensor`): `[sequences, context_length]` token ids, see [`token_blocks`].
        hookpoints (`Sequence[str]`): such as `["layers.5", "layers.6"]`.
        output_dir (`str` or `os.PathLike`): folder of the store.
        batch_size (`int`, defaults to 8): sequences of a forward. A run resumed with another one gives the same
            activations but for the last bits of their sums.
        dtype (`str`, defaults to `"bfloat16"`): or `"float16"`, `"float32"`.
        skip_positions (`int`, defaults to 1): see [`ModelActivations`].
        model_name (`str`, *optional*): recorded; default the name it was loaded by.
        tokenizer_name (`str`, *optional*): recorded; Hub id or folder by which the token ids can be read.
        corpus (`Mapping`, *optional*): JSON values recorded about the texts: dataset, split, seed.
        rows_per_shard (`int`, *optional*): default as many as make 256 MB.
        rank (`int`, defaults to 0): of this process, which takes its part of the sequences.
        world_size (`int`, defaults to 1): processes that share the sequences.
        progress (`bool`, defaults to `True`): show a progress bar.

    Returns:
        [`ActivationStore`]: complete once all ranks are done.

    Raises:
        StoreMismatchError: if the folder holds activations of another model, corpus or setting.
        ValueError: if an argument does not fit, or an activation is not finite in this dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Pass one of {', '.join(DTYPES)}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size}. Pass 0 ... {world_size - 1}.")
    if not hookpoints or len(set(hookpoints)) < len(hookpoints):
        raise ValueError(f"hookpoints={list(hookpoints)} are none, or one twice. Pass each once, ['layers.0'].")
    first, last = (len(sequences) * number // world_size for number in (rank, rank + 1))
    if first == last:
        raise ValueError(f"sequences are {len(sequences)}, too few for world_size={world_size}. Pass fewer processes.")
    source = ModelActivations(model, sequences[first:last], hookpoints, batch_size, DTYPES[dtype], skip_positions)
    identity = {
        "kind": KIND,
        "model": model_name or model.config._name_or_path or type(model).__name__,
        "weights": _fingerprint(model),
        "tokenizer": tokenizer_name,
        "corpus": dict(corpus or {}),
        "sequences": sequences_digest(sequences),
        "context_length": sequences.shape[1],
        "skip_positions": skip_positions,
        "num_tokens": len(sequences) * source.tokens_per_sequence,
        "dtype": dtype,
        "world_size": world_size,
    }
    with contextlib.ExitStack() as stack:
        stores = {}
        for name in hookpoints:
            width = source.d_in(name)
            size = rows_per_shard or max(1, SHARD_BYTES // (width * source.dtype.itemsize))
            store = RowStore(
                Path(output_dir) / name,
                {**identity, "hookpoint": name, "d_in": width},
                extra={"version": __version__, "batch_size": batch_size},
                rank=rank,
                rows_per_shard=size,
            )
            stores[name] = stack.enter_context(store)
        _write_sequences(Path(output_dir), sequences, tmp_suffix=f".{hookpoints[0]}.{rank:05d}.tmp")
        _append_missing(source, stores, progress)
        for store in stores.values():
            store.finish() if world_size == 1 else store.seal()
    return ActivationStore.open(output_dir)


def _append_missing(source: ModelActivations, stores: Mapping[str, RowStore], progress: bool) -> None:
    """One pass from the first token that a store lacks; each store takes the rows it has not got."""
    unfinished = {name: store for name, store in stores.items() if store.num_rows < source.num_tokens}
    if not unfinished:
        return
    source.hookpoints = list(unfinished)
    start = min(store.num_rows for store in unfinished.values())
    with tqdm(
        total=source.num_tokens, initial=start, desc="Extracting", unit="token", unit_scale=True, disable=not progress
    ) as bar:
        for chunk in source.chunks(start):
            num_rows = len(next(iter(chunk.values())))
            for name, store in unfinished.items():
                _append(store, name, chunk[name][max(0, store.num_rows - start) :].cpu())
            start += num_rows
            bar.update(num_rows)


def _append(store: RowStore, hookpoint: str, rows: Tensor) -> None:
    """Appends rows, cut where shards end, so that shards do not depend on the size of a forward."""
    if not torch.isfinite(rows).all():
        where = store.num_rows + int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
        raise ValueError(
            f"hookpoint={hookpoint!r} has an activation that is not finite at token {where} in {rows.dtype}. "
            "Pass dtype='bfloat16' or 'float32', whose range is wider than that of float16, or check the model."
        )
    while len(rows):
        piece = rows[: store.rows_per_shard - store.num_rows % store.rows_per_shard]
        values = piece.contiguous().view(torch.uint16) if piece.dtype == torch.bfloat16 else piece
        store.append({ACTIVATION: values.numpy()})
        rows = rows[len(piece) :]


def _write_sequences(folder: Path, sequences: Tensor, tmp_suffix: str) -> None:
    """Writes the token ids; other processes may be writing the same ones."""
    file = folder / TOKENS_FILE
    file.with_name(file.name + tmp_suffix).unlink(missing_ok=True)
    if not file.exists():
        content = save({"input_ids": sequences.to("cpu", torch.int32).contiguous()})
        with atomic_write(file, tmp_suffix=tmp_suffix) as opened:
            opened.write(content)
        return
    try:
        stored = sequences_digest(load_file(file)["input_ids"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete it, and extract again.") from error
    if stored != sequences_digest(sequences):
        raise StoreMismatchError(
            f"{file} holds other sequences than those given. Pass another output_dir, or the texts it was made with."
        )


def _fingerprint(model: PreTrainedModel) -> str:
    """A hash of names, shapes and a sample of the values of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)][:SAMPLED_VALUES].cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
