"""What tells one run's rows from another's: a store is continued only by the run that began it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..core import distributed
from ..core.calls import Layer
from .config import GhostDotProdConfig


_SAMPLED_VALUES = 256  # of every tensor: enough to tell checkpoints apart, nothing to wait for


def run_identity(
    model: nn.Module, layers: Sequence[Layer], validation_sizes: Mapping[str, int], config: GhostDotProdConfig
) -> dict[str, Any]:
    """Model, scored parameters, validation sets and options, as JSON values.

    Trainable weights are not part of it, since a resumed run starts from other ones; frozen weights are.
    """
    options = config.identity()
    return {
        "kind": "ghost_dot_products",
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "model_class": type(model).__name__,
        "frozen_weights": frozen_fingerprint(model),
        "layers": [layer.name for layer in layers],
        "parameters": {layer.name: {name: list(p.shape) for name, p in layer.parameters.items()} for layer in layers},
        "layer_patterns": options.pop("layers"),
        "validation_sets": dict(validation_sizes),
        "world_size": distributed.world_size(),
        **options,
    }


def frozen_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and a sample of the values of all frozen parameters."""
    return _fingerprint((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and a sample of the values of all parameters."""
    return _fingerprint(model.named_parameters())


def _fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in parameters:
        flat = distributed.to_local(parameter.detach()).reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::stride][:_SAMPLED_VALUES].cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
