"""The engine's self-check: is all of the gradient in the per-sample values?

Autograd accumulates `p.grad` on its own; its product with the target must equal the sum of the values of all layers
that use the parameter. A use that no layer saw (a weight multiplied outside its module's forward) shows as a gap.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..core import linear
from ..core.calls import Layer
from ..core.distributed import all_reduce_sum, is_sharded, local_part, mean_over_ranks, to_local, world_size


logger = logging.getLogger(__name__)

# Autograd rounds half-precision weight gradients to 8 bits or so; small layers do not average that away.
_HALF_PRECISION_SLACK = 30


class UncoveredGradientError(RuntimeError):
    """Part of the model's gradient is not in the per-sample values."""


class SelfCheck:
    """Compares the gradients of a step with its values.

    Args:
        layers: the scored layers.
        on_uncovered: "error" or "warn" when a part is missing.
        tolerance: relative size at which it is.
    """

    def __init__(self, layers: Sequence[Layer], on_uncovered: Literal["error", "warn"], tolerance: float):
        self.layers = layers
        self.groups = parameter_groups(layers)
        self.on_uncovered, self.tolerance = on_uncovered, tolerance
        self.half_precision = False  # half-precision gradients have been seen
        self._targets: Mapping[nn.Parameter, Tensor] = {}
        self._before: dict[nn.Parameter, Tensor] = {}
        self._after: dict[nn.Parameter, Tensor] = {}

    def start(self, targets: Mapping[nn.Parameter, Tensor]) -> None:
        """A step begins that is scored against `targets`, `[K, *shape]` each; gradients may be there already."""
        self._targets, self._after = targets, {}
        self._before = {p: self._products(p) for p in targets if p.grad is not None}

    def record(self, parameter: nn.Parameter) -> None:
        """The parameter's gradient has just been accumulated."""
        self._after[parameter] = self._products(parameter)

    def clip_coefficient(self) -> float:
        """What the gradients were multiplied by since they were recorded."""
        raw = torch.stack(list(self._after.values()))
        now = torch.stack([self._products(p) for p in self._after])
        mean_over_ranks([raw])
        size = raw.abs().sum()
        return float((raw.sign() * now).sum() / size) if size > 0 else 1.0

    def residual(self, values: Tensor) -> float:
        """Ends the step: the share of the values that the gradients do not confirm, or the reverse.

        Args:
            values: `[L, K, M]` float64, of this rank's samples, before averaging over ranks.

        Raises:
            UncoveredGradientError: the share of a whole group of layers is missing and `on_uncovered="error"`.
        """
        groups = sorted(set(self.groups))
        observed = values.new_zeros(len(groups), 3, values.shape[1])  # by gradient, by values, size of the values
        for g, group in enumerate(groups):
            members = [i for i, other in enumerate(self.groups) if other == group]
            for p in {p: None for i in members for p in self.layers[i].parameters.values()}:
                if p in self._after:
                    observed[g, 0] += self._after[p] - self._before.get(p, 0.0)
            of_group = values[members].sum(0)
            observed[g, 1], observed[g, 2] = of_group.sum(-1), of_group.abs().sum(-1)
        if any(is_sharded(p) for p in self._targets):  # FSDP2 hands out the mean over ranks, in parts
            observed[:, 1:] /= world_size()
            all_reduce_sum([observed])
        gap = (observed[:, 0] - observed[:, 1]).abs()
        scale = torch.maximum(observed[:, 0].abs(), observed[:, 2])
        total = scale.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        residual = float((gap.sum(0) / total).max())
        # A group must be off by its own measure and matter: rounding alone can exceed the one in a layer whose
        # gradient is all but orthogonal to the validation gradient.
        tolerance = self.tolerance * (_HALF_PRECISION_SLACK if self.half_precision else 1)
        missing = (gap > tolerance * scale) & (gap > 1e-2 * tolerance * total)
        if bool(missing.any()):
            self._report([groups[g] for g in missing.any(1).nonzero().flatten().tolist()], residual)
        return residual

    def _products(self, parameter: nn.Parameter) -> Tensor:
        """⟨p.grad, G_k⟩, `[K]`; of this rank's part where the parameter is sharded."""
        assert parameter.grad is not None
        grad = to_local(parameter.grad)
        return torch.stack([linear.flat_dot(grad, local_part(t, parameter)) for t in self._targets[parameter]])

    def _report(self, groups: Sequence[int], residual: float) -> None:
        names = [layer.name for layer, group in zip(self.layers, self.groups, strict=True) if group in groups]
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        message = (
            f"the gradient of {listed} is not explained by the per-sample values (unaccounted share {residual:.1e}): "
            "the parameters are used outside their module's forward. Leave these layers out by layers=[...], register "
            "a rule with hf_gradtools.core.layers.register_rule, or pass on_uncovered='warn'."
        )
        if self.on_uncovered == "error":
            raise UncoveredGradientError(message)
        logger.warning(message)


def parameter_groups(layers: Sequence[Layer]) -> list[int]:
    """For each layer the first layer that it shares a parameter with, directly or through others."""
    group = list(range(len(layers)))
    owner: dict[nn.Parameter, int] = {}
    for i, layer in enumerate(layers):
        for p in layer.parameters.values():
            low, high = sorted((group[i], group[owner.setdefault(p, i)]))
            group = [low if g == high else g for g in group]
    return group


def refuse_batch_statistics(layers: Sequence[Layer]) -> None:
    """ValueError if a layer mixes the samples of a batch, as batch normalisation does while it trains."""
    mixing = [layer.name for layer in layers if isinstance(layer.module, nn.modules.batchnorm._BatchNorm)]
    if mixing:
        raise ValueError(
            f"{', '.join(mixing[:5])}: batch normalisation mixes the samples of a batch, so per-sample gradients do "
            "not exist; freeze these layers' parameters or leave them out by layers=[...]"
        )
