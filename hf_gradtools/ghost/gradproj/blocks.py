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
    energy_ranks,
    principal_basis,
    random_basis,
    split_rank,
    square_ranks,
)
from .config import AUTO, AUTO_RANK, GradProjConfig


Tokens = Mapping[tuple[str, str], torch.Tensor]  # (block, "out" or "in") -> [T, O] or [T, I]


def parameter_names(layers: Sequence[Layer]) -> dict[nn.Parameter, str]:
    """The name of each parameter: that of its first layer, and its own; tied ones have one name."""
    names: dict[nn.Parameter, str] = {}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            names.setdefault(parameter, f"{layer.name}.{name}".lstrip("."))
    return names


def block_shapes(layers: Sequence[Layer]) -> dict[str, tuple[int, int]]:
    """(O, I) of every parameter's gradient as a matrix, by its name."""
    names = parameter_names(layers)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            outputs, inputs = layer.rule.as_matrix(name, parameter.detach()).shape
            shapes.setdefault(names[parameter], (outputs, inputs))
    return shapes


def find_blocks(layers: Sequence[Layer], config: GradProjConfig, energies: Mapping[str, float]) -> list[Block]:
    """The blocks of all parameters, with the ranks that the options give them.

    Args:
        layers: whose parameters.
        config: `rank`, or `proj_rank_total` to be split.
        energies: mean squared norm of each block's gradients, for ranks by energy.
    """
    shapes = block_shapes(layers)
    if config.rank == AUTO:
        ranks = list(_ranks_by_energy(shapes, energies).values())
    elif config.rank is None:
        assert config.proj_rank_total is not None
        ranks = split_rank(list(shapes.values()), config.proj_rank_total)
    else:
        assert isinstance(config.rank, tuple)
        ranks = [_ranks(shape, *config.rank) for shape in shapes.values()]
    return [Block(name, shape, rank) for (name, shape), rank in zip(shapes.items(), ranks, strict=True)]


def _ranks_by_energy(
    shapes: Mapping[str, tuple[int, int]], energies: Mapping[str, float]
) -> dict[str, tuple[int, int]]:
    """Of matrices as many numbers as ranks of 64 would make, by energy; vectors have up to 64² numbers each."""
    ranks = {name: square_ranks(shape, AUTO_RANK**2) for name, shape in shapes.items()}
    if matrices := [name for name, (_, inputs) in shapes.items() if inputs > 1]:
        sizes, weights = [shapes[name] for name in matrices], [energies.get(name, 0.0) for name in matrices]
        ranks.update(zip(matrices, energy_ranks(sizes, weights, AUTO_RANK**2 * len(matrices)), strict=True))
    return ranks


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


def _to(basis: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if basis is None else basis.to(device)
