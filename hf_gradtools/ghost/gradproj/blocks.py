"""From the layers of a model to the projection of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ...core.calls import Layer
from ...core.layers import EmbeddingRule
from ...core.projection import (
    BASES,
    Bases,
    Block,
    Projection,
    principal_basis,
    random_basis,
    split_rank,
    square_ranks,
)
from .config import GradProjConfig


Tokens = Mapping[tuple[str, str], torch.Tensor]  # (block, "out" or "in") -> [T, O] or [T, I]


def parameter_names(layers: Sequence[Layer]) -> dict[nn.Parameter, str]:
    """The name of each parameter: that of its first layer, and its own; tied ones have one name."""
    names: dict[nn.Parameter, str] = {}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            names.setdefault(parameter, f"{layer.name}.{name}".lstrip("."))
    return names


def find_blocks(layers: Sequence[Layer], config: GradProjConfig) -> list[Block]:
    """The blocks of all parameters, with the ranks that the options give them."""
    shapes: dict[str, tuple[int, int]] = {}
    names = parameter_names(layers)
    for layer in layers:
        for name, parameter in layer.parameters.items():
            outputs, inputs = layer.rule.as_matrix(name, parameter.detach()).shape
            shapes.setdefault(names[parameter], (outputs, inputs))
    if config.rank is None:
        assert config.proj_rank_total is not None
        ranks = split_rank(list(shapes.values()), config.proj_rank_total)
    else:
        assert not isinstance(config.rank, int)
        k_in, k_out = config.rank
        ranks = [_ranks(shape, k_in, k_out) for shape in shapes.values()]
    return [Block(name, shape, rank) for (name, shape), rank in zip(shapes.items(), ranks, strict=True)]


def _ranks(shape: tuple[int, int], k_in: int | None, k_out: int | None) -> tuple[int, int]:
    outputs, inputs = shape
    if inputs == 1:  # a vector: as many numbers as a matrix
        return square_ranks(shape, outputs if k_in is None or k_out is None else k_in * k_out)
    return min(outputs, k_out or outputs), min(inputs, k_in or inputs)


def random_bases(blocks: Sequence[Block], config: GradProjConfig, device: torch.device) -> dict[str, Bases]:
    """Both random bases of every block; "pca" has orthonormal ones until it is fitted, and where it cannot be."""
    kind = config.basis if config.basis in BASES else "orthonormal"
    bases = {}
    for block in blocks:
        sides = [
            random_basis(size, rank, kind, config.seed, block.name, side)
            for size, rank, side in zip(block.shape, block.ranks, ("out", "in"), strict=True)
        ]
        bases[block.name] = (_to(sides[0], device), _to(sides[1], device))
    return bases


def principal_bases(
    blocks: Sequence[Block], layers: Sequence[Layer], tokens: Tokens, random: Mapping[str, Bases], seed: int
) -> dict[str, Bases]:
    """The bases of `random`, with the main directions of the tokens in their place where a block has tokens.

    The vocabulary's side of an embedding keeps its random basis.
    """
    names = parameter_names(layers)
    vocabularies = {names[p] for x in layers if isinstance(x.rule, EmbeddingRule) for p in x.parameters.values()}
    bases = {}
    for block in blocks:
        pair = list(random[block.name])
        for i, side in enumerate(("out", "in")):
            if (block.name, side) in tokens and not (side == "out" and block.name in vocabularies):
                pair[i] = principal_basis(tokens[block.name, side], block.ranks[i], seed, block.name, side)
        bases[block.name] = (pair[0], pair[1])
    return bases


def build_projection(
    blocks: Sequence[Block], bases: Mapping[str, Bases], config: GradProjConfig, device: torch.device
) -> Projection:
    return Projection(blocks, bases, config.sketch_dim, config.seed, device)


def _to(basis: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if basis is None else basis.to(device)
