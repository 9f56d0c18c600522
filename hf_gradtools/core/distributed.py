"""The few collectives the library needs; every function is the identity in a single process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Sums each tensor over the ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether the tensor is a DTensor, as FSDP2 makes of parameters."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered on every rank (a collective); other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole


def local_part(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks hold whole, cut as the sharded `like` is; no communication."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    part: Tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part


def mean_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Averages each tensor over the ranks, in place."""
    tensors = list(tensors)
    all_reduce_sum(tensors)
    with torch.no_grad():
        for tensor in tensors:
            tensor.div_(world_size())
