"""Which layers of a model are projected."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ...core.calls import Layer
from ...core.capture import find_layers
from ...core.distributed import is_sharded
from ..models import differentiated


logger = logging.getLogger(__name__)

_MOST = 0.5  # of the matrix weights


def choose_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> list[Layer]:
    """The layers that `GradProjConfig.layers` names, of the parameters that gradients are taken in.

    Raises:
        ValueError: there is none, or parameters are sharded over processes.
    """
    if any(is_sharded(p) for p in model.parameters()):
        # Ranks project different numbers of batches, and a sharded model's forward is a collective.
        raise ValueError(
            "the model's parameters are sharded (FSDP2); GradProjector needs them whole on every rank: load the model "
            "without fully_shard, each process takes a part of the rows"
        )
    with differentiated(model) as parameters:
        layers = find_layers(model, patterns)
    if not layers:
        what = f"layers={patterns!r} leaves no layer"
        if getattr(model, "quantization_method", None) is not None:
            raise ValueError(f"{what}: quantised weights have no gradient; add adapters, as by peft.get_peft_model")
        raise ValueError(f"{what}; pass layers=None or names of modules")
    if patterns == "all-linear":
        _warn_of_gaps(model, layers, parameters)
    return layers


def _warn_of_gaps(model: nn.Module, layers: Sequence[Layer], parameters: Sequence[nn.Parameter]) -> None:
    """Of matrix weights that "all-linear" does not reach, such as stacked experts."""
    set_aside = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    set_aside |= set() if head is None else set(head.parameters())
    sizes = {p: p.numel() for p in parameters if p.ndim > 1 and p not in set_aside}
    reached, total = sum(sizes.get(p, 0) for x in layers for p in x.parameters.values()), sum(sizes.values())
    if reached < _MOST * total:
        logger.warning(
            "layers='all-linear' reaches %s of %s matrix weights outside embeddings and head; the others (experts, "
            "convolutions, ...) are left out. layers=None takes all.",
            f"{reached:,}",
            f"{total:,}",
        )
