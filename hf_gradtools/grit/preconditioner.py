"""Turns the gradients of all A and B before the optimizer's step, and the steps back after it.

Matrices of equal shape are worked on together. Shape letters: M matrices of a group, R rank, D the other dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_gradtools.core.curvature import graft


@dataclass
class Turn:
    """What is done to one parameter's gradient: `matrix @ grad` for an A `[R, D]`, `grad @ matrix` for a B `[D, R]`.

    Attributes:
        parameter: the A or B.
        matrix: `[R, R]`: an inverse factor, or the eigenvectors in the columns.
        is_up: whether it is a B.
    """

    parameter: Parameter
    matrix: Tensor
    is_up: bool


@dataclass
class _Group:
    parameters: list[Parameter]
    matrices: Tensor  # [M, R, R], in the dtype it is multiplied in
    is_up: bool
    before: list[Tensor] = field(default_factory=list)  # parameters before the step, while one is being taken
    turned: list[Tensor] = field(default_factory=list)  # the same as the optimizer saw them

    def multiply(self, values: Sequence[Tensor], transposed: bool = False) -> list[Tensor]:
        """`matrix @ value` for A's, `value @ matrix` for B's."""
        matrices = self.matrices.mT if transposed else self.matrices
        values = [value.to(matrices.dtype) for value in values]
        if not matrices.is_cuda:  # on a CPU stacking costs more than it saves
            return [v @ m if self.is_up else m @ v for m, v in zip(matrices.unbind(), values, strict=True)]
        stacked = torch.stack(values)
        return list((torch.bmm(stacked, matrices) if self.is_up else torch.bmm(matrices, stacked)).unbind())


class Preconditioner:
    """Applies :class:`Turn`s.

    Args:
        turns: at most one for each parameter.
        rotates: the matrices are orthogonal and the optimizer is to work in their coordinates (rank-SOAP); else the
            gradient is multiplied and that is all.
        keep_norm: give each gradient its norm back (grafting); a rotation keeps it anyway.
    """

    def __init__(self, turns: Sequence[Turn], rotates: bool, keep_norm: bool):
        self.rotates, self.keep_norm = rotates, keep_norm
        grouped: dict[tuple[object, ...], list[Turn]] = defaultdict(list)
        for turn in turns:
            grouped[turn.parameter.shape, turn.is_up, turn.parameter.dtype, turn.parameter.device].append(turn)
        self._groups = [
            _Group(
                [turn.parameter for turn in members],
                torch.stack([turn.matrix for turn in members]).to(parameter.device, _working_dtype(parameter)),
                members[0].is_up,
            )
            for members in grouped.values()
            for parameter in [members[0].parameter]
        ]

    @torch.no_grad()
    def turn_gradients(self) -> None:
        """Replaces every gradient."""
        for group in self._groups:
            # A layer that took no part in the step has no gradient; zeros stand in its place.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group.parameters]
            turned = group.multiply(grads, transposed=self.rotates and not group.is_up)
            if self.keep_norm and not self.rotates:
                turned = [graft(new, old.to(new)) for new, old in zip(turned, grads, strict=True)]
            torch._foreach_copy_(grads, turned)

    @torch.no_grad()
    def turn_parameters(self, with_values: bool) -> None:
        """For a rotation, just before the step: lets the optimizer see the parameters in its own coordinates.

        Args:
            with_values: the step depends on the parameters' values (weight decay). If not they are left as they are,
                and only the step is turned back.
        """
        for group in self._groups:
            group.before = [p.detach().clone() for p in group.parameters]
            group.turned = group.before
            if with_values:
                turned = group.multiply(group.before, transposed=not group.is_up)
                group.turned = [t.to(p.dtype) for t, p in zip(turned, group.parameters, strict=True)]
                torch._foreach_copy_(group.parameters, group.turned)

    @torch.no_grad()
    def turn_steps_back(self) -> None:
        """After the step: the parameters of before, plus what the optimizer did to them in its own coordinates.

        Only the step goes through a rotation, so parameters in half precision do not collect its rounding.
        """
        for group in self._groups:
            steps = torch._foreach_sub([p.detach() for p in group.parameters], group.turned)
            back = group.multiply(steps, transposed=group.is_up)
            new = [p.to(step.dtype) + step for p, step in zip(group.before, back, strict=True)]
            torch._foreach_copy_(group.parameters, new)
            group.before, group.turned = [], []


def _working_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
