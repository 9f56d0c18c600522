"""What a few samples tell about a model's gradients: where they are large, and in which directions.

Ranks by energy go into the store's manifest, "pca" bases into a file beside it: no seed brings them back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ...core.calls import Layer, LayerCall
from ...core.checksums import Damage, StoreCorruptError
from ...core.layers import EmbeddingRule, LinearRule
from ...core.projection import Bases
from ...core.samples import SampleLayout
from ...core.store import atomic_write
from .blocks import parameter_names


BASES_FILE = "bases.safetensors"
_TOKENS_PER_CALL = 512  # kept of each layer, evenly spaced: directions converge long before


class FitCollector:
    """An observer that measures each layer's gradient norms and keeps some of its tokens.

    Args:
        layers: that are observed.
        with_tokens: keep tokens.
    """

    def __init__(self, layers: Sequence[Layer], with_tokens: bool):
        self.layers, self.with_tokens = layers, with_tokens
        self.names = parameter_names(layers)
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._layout: SampleLayout | None = None
        self._sq_norms: Tensor | None = None
        self._tokens: dict[tuple[str, str], list[Tensor]] = {}
        self._replaying = False

    def begin(self, layout: SampleLayout, device: torch.device, dtype: torch.dtype) -> None:
        """The calls from here on are of these samples."""
        self._layout = layout
        self._sq_norms = torch.zeros(layout.num_samples, len(self.layers), dtype=dtype, device=device)

    def take(self) -> Tensor:
        """Ends the batch: the norm of each layer's gradient of every sample, `[num_samples, layers]`."""
        assert self._sq_norms is not None
        norms, self._layout = self._sq_norms.sqrt(), None
        return norms

    # ---- Observer

    def rows(self) -> int | None:
        return None if self._layout is None or self._replaying else self._layout.rows

    def seen(self, layer: Layer) -> None:
        pass

    def observe(self, layer: Layer, call: LayerCall) -> None:
        assert self._layout is not None
        assert self._sq_norms is not None
        self._replaying = True
        try:
            norms = layer.rule.sq_norms(layer, call, self._layout)
        finally:
            self._replaying = False
        self._sq_norms[:, self._index[layer]] += norms.to(self._sq_norms.dtype)
        if self.with_tokens and "weight" in layer.parameters:
            self._keep_tokens(layer, call)

    def wants_takeover(self, layer: Layer, activations: Tensor) -> bool:
        return False

    def take_over(self, layer: Layer, activations: Tensor, output_grads: Tensor) -> Tensor:
        raise NotImplementedError("calls are only looked at")

    def _keep_tokens(self, layer: Layer, call: LayerCall) -> None:
        if not isinstance(layer.rule, (LinearRule, EmbeddingRule)):
            return
        grads = call.output_grad.flatten(0, -2)
        counted = grads.abs().amax(1).nonzero().flatten()  # padding and ignored labels have none
        kept = counted[:: max(1, len(counted) // _TOKENS_PER_CALL)]
        # An embedding's "out" side is the vocabulary; its output gradients are the "in" side.
        sides = {"in": grads}
        if isinstance(layer.rule, LinearRule):
            sides = {"out": grads, "in": call.activations.flatten(0, -2)}
        for side, values in sides.items():
            key = (self.names[layer.parameters["weight"]], side)
            self._tokens.setdefault(key, []).append(values[kept].float())

    # ---- what was found

    def tokens(self) -> dict[tuple[str, str], Tensor]:
        """Tokens `[T, d]` by block and side."""
        return {key: torch.cat(values) for key, values in self._tokens.items()}

    def energies(self, norms: Tensor) -> dict[str, float]:
        """Mean squared norm of the gradients of each block, a layer's for each of its parameters.

        Args:
            norms: `[samples, layers]`, as :meth:`take` gives them, of all samples.
        """
        means = norms.double().square().mean(0).tolist()
        energies: dict[str, float] = {}
        for layer, mean in zip(self.layers, means, strict=True):
            for parameter in layer.parameters.values():
                name = self.names[parameter]
                energies[name] = energies.get(name, 0.0) + mean
        return energies


def bases_digest(bases: Mapping[str, Bases]) -> str:
    """A hash of all bases."""
    return hashlib.sha256(_serialized(bases)).hexdigest()[:16]


def check_bases(folder: str | Path, digest: str | None) -> None:
    """Compares the bases in a store's folder with the digest in its identity.

    Raises:
        StoreCorruptError: they differ, or are missing.
    """
    if digest is None:
        return
    path = Path(folder) / BASES_FILE
    size = path.stat().st_size if path.exists() else 0
    try:
        intact = bases_digest(load_bases(folder, torch.device("cpu"))) == digest
    except SafetensorError:
        intact = False
    if not intact:
        what = "differs from what was written" if size else "is missing"
        raise StoreCorruptError(Path(folder), [Damage(BASES_FILE, what, (0, size))])


def save_bases(bases: Mapping[str, Bases], folder: str | Path) -> None:
    """Writes fitted bases beside the rows that are made with them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / BASES_FILE) as file:
        file.write(_serialized(bases))


def load_bases(folder: str | Path, device: torch.device) -> dict[str, Bases]:
    """What :func:`save_bases` wrote; empty if there is no such file."""
    path = Path(folder) / BASES_FILE
    found: dict[str, list[Tensor | None]] = {}
    for key, value in (load_file(path, device=str(device)) if path.exists() else {}).items():
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
