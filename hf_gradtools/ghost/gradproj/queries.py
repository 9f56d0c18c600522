"""What a search may be given: gradients, stores of them, or rows whose gradients are taken now; alone or in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor


if TYPE_CHECKING:
    from .search import Searchable
    from .store import GradientStore

Reduction = Literal["mean", "max"]
REDUCTIONS = ("mean", "max")


@dataclass
class Queries:
    """Gradients of queries, and the groups that they are scored in.

    Attributes:
        names: one for each group.
        sizes: queries in each group.
        reduce: how the scores of a group become one; `None` where each query is a group.
        gradients: for each store `[Q, dim]`.
    """

    names: list[Any]
    sizes: list[int]
    reduce: Reduction | None
    gradients: list[Tensor]


def resolve_queries(target: Searchable, queries: Any, reduce: Reduction | None, optimizer_aware: bool) -> Queries:
    """The gradients that `queries` stand for.

    Args:
        target: what is searched.
        queries: see [`Searchable.search`].
        reduce: of the scores of a group; `None` is "mean" for named groups, no grouping for others.
        optimizer_aware: take gradients of the optimizer's step.

    Raises:
        StoreMismatchError: a store of queries has gradients of another identity.
        ValueError: they are of another shape, are not finite, or cannot be had without a projector.
    """
    if reduce is not None and reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is unknown. Pass None, 'mean' or 'max'.")
    if not isinstance(queries, Mapping):
        gradients = _gradients(target, queries, optimizer_aware, "queries")
        count = len(gradients[0])
        if reduce is None:
            return Queries(list(range(count)), [1] * count, None, gradients)
        return Queries([0], [count], reduce, gradients)
    if "input_ids" in queries:
        raise ValueError(
            "queries is one row; pass a list of rows, or a mapping from the names of tasks to their rows."
        )
    if not queries:
        raise ValueError("queries is an empty mapping; pass at least one task.")
    groups = [_gradients(target, group, optimizer_aware, f"queries[{name!r}]") for name, group in queries.items()]
    joined = [torch.cat(parts) for parts in zip(*groups, strict=True)]
    return Queries([str(name) for name in queries], [len(group[0]) for group in groups], reduce or "mean", joined)


def _gradients(target: Searchable, given: Any, optimizer_aware: bool, name: str) -> list[Tensor]:
    """For each store of the target `[Q, dim]`."""
    stores = target.stores
    if _are_rows(given):
        parts = [_project(store, given, optimizer_aware) for store in stores]
    elif optimizer_aware:
        raise ValueError(
            "precondition='adam' scales the gradients of queries by the optimizer's state, which needs their rows: "
            f"bind a projector, store.bind(projector), and pass tokenized rows in the place of {name}."
        )
    elif isinstance(getattr(given, "stores", None), list):  # Searchable; its module imports this one
        if len(given.stores) != len(stores):
            raise ValueError(f"{name} has {len(given.stores)} stores, the target {len(stores)}. Pass one for each.")
        parts = [_of_store(store, other) for store, other in zip(stores, given.stores, strict=True)]
    elif len(stores) == 1:
        parts = [_as_tensor(given, name)]
    else:
        parts = _one_for_each(target, given, name)
    for store, part in zip(stores, parts, strict=True):
        _check(part, store.dim, name)
    return parts


def _one_for_each(target: Searchable, given: Any, name: str) -> list[Tensor]:
    stores = target.stores
    if not isinstance(given, Sequence) or len(given) != len(stores):
        raise ValueError(
            f"{name} is searched in {len(stores)} stores; pass a list of {len(stores)} arrays of gradients, one for "
            "each, or rows after each store was bound to its projector."
        )
    return [
        _of_store(store, part) if isinstance(getattr(part, "stores", None), list) else _as_tensor(part, name)
        for store, part in zip(stores, given, strict=True)
    ]


def _are_rows(given: Any) -> bool:
    if isinstance(given, (list, tuple)):
        return len(given) > 0 and isinstance(given[0], Mapping)
    return type(given).__module__.startswith("datasets.")


def _project(store: GradientStore, rows: Any, optimizer_aware: bool) -> Tensor:
    if store.projector is None:
        raise ValueError(
            f"queries are rows, and the store {store.path} has no projector to take their gradients. Bind the one "
            "that made it, store.bind(projector), or pass gradients [queries, dim]."
        )
    # Its model may have trained on since it was bound.
    store.check_comparable(store.projector.identity(), "the projector as it is now")
    gradients: Tensor = store.projector.gradients(rows, optimizer_aware=optimizer_aware)
    return gradients.detach().float().cpu()


def _of_store(store: GradientStore, other: Any) -> Tensor:
    store.check_comparable(other.identity, f"the store of queries {other.path}")
    return torch.cat([block.clone() for _, block in other.blocks()]) if len(other) else torch.empty(0, store.dim)


def _as_tensor(given: Any, name: str) -> Tensor:
    try:
        tensor = given if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is {type(given).__name__}, not gradients [queries, dim], a store or rows."
        ) from error
    tensor = tensor.detach().float().cpu()
    return tensor[None] if tensor.ndim == 1 else tensor


def _check(gradients: Tensor, dim: int, name: str) -> None:
    if gradients.ndim != 2 or gradients.shape[1] != dim:
        raise ValueError(f"{name} has shape {tuple(gradients.shape)}; the store needs [queries, dim={dim}].")
    if len(gradients) == 0:
        raise ValueError(f"{name} has 0 queries; pass at least 1.")
    if not torch.isfinite(gradients).all():
        first = int((~torch.isfinite(gradients).all(dim=1)).nonzero()[0])
        raise ValueError(f"{name}: query {first} is not finite. Leave it out, or find out why its gradient is not.")
