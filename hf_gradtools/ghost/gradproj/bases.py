"""Main directions of activations and output gradients, collected from a few samples, and their file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...core.calls import Layer, LayerCall
from ...core.layers import EmbeddingRule, LinearRule
from ...core.projection import Bases
from ...core.store import atomic_write
from .blocks import parameter_names


BASES_FILE = "bases.safetensors"
_TOKENS_PER_BATCH = 512  # kept of each layer, evenly spaced: directions converge long before


class TokenCollector:
    """An observer that keeps some tokens of every call, for both sides of each block: output gradients on the "out"
    side, activations on the "in" side. Of embeddings, whose "out" side is the vocabulary, the output gradients are
    the "in" side."""

    def __init__(self, layers: Sequence[Layer]):
        self.names = parameter_names(layers)
        self.num_rows: int | None = None  # of the batch in the model
        self._found: dict[tuple[str, str], list[Tensor]] = {}

    def rows(self) -> int | None:
        return self.num_rows

    def seen(self, layer: Layer) -> None:
        pass

    def observe(self, layer: Layer, call: LayerCall) -> None:
        if "weight" not in layer.parameters or not isinstance(layer.rule, (LinearRule, EmbeddingRule)):
            return
        grads = call.output_grad.flatten(0, -2)
        counted = grads.abs().amax(1).nonzero().flatten()  # padding and ignored labels have none
        kept = counted[:: max(1, len(counted) // _TOKENS_PER_BATCH)]
        if isinstance(layer.rule, EmbeddingRule):
            sides = {"in": grads}
        else:
            sides = {"out": grads, "in": call.activations.flatten(0, -2)}
        for side, values in sides.items():
            key = (self.names[layer.parameters["weight"]], side)
            self._found.setdefault(key, []).append(values[kept].float())

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        return False

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        raise NotImplementedError("tokens are only looked at")

    def tokens(self) -> dict[tuple[str, str], Tensor]:
        """Tokens `[T, d]` by block and side."""
        return {key: torch.cat(values) for key, values in self._found.items()}


def bases_digest(bases: Mapping[str, Bases]) -> str:
    """A hash of all bases."""
    return hashlib.sha256(_serialized(bases)).hexdigest()[:16]


def save_bases(bases: Mapping[str, Bases], folder: str | Path) -> None:
    """Writes fitted bases, which no seed brings back, beside the rows that were made with them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / BASES_FILE) as file:
        file.write(_serialized(bases))


def load_bases(folder: str | Path, device: torch.device) -> dict[str, Bases] | None:
    """What :func:`save_bases` wrote, None if there is no such file."""
    path = Path(folder) / BASES_FILE
    if not path.exists():
        return None
    found: dict[str, list[Tensor | None]] = {}
    for key, value in load_file(path, device=str(device)).items():
        name, side = key.rsplit("/", 1)
        pair = found.setdefault(name, [None, None])
        pair[side == "in"] = value if value.numel() else None
    return {name: (out_basis, in_basis) for name, (out_basis, in_basis) in found.items()}


def _serialized(bases: Mapping[str, Bases]) -> bytes:
    tensors = {}
    for name in sorted(bases):
        for side, basis in zip(("out", "in"), bases[name], strict=True):
            tensors[f"{name}/{side}"] = torch.empty(0) if basis is None else basis.cpu().contiguous()
    return save(tensors)
