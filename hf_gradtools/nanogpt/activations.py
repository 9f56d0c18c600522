"""Activations: ours by their usual names, and every name that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .costs import Ops
from .registry import VARIANTS, Component, register, variant


class Activation(Component):
    """An element-wise function; `per_element` is what it costs."""

    per_element: Ops

    def __init__(self, config: Any = None, layer_idx: int = 0):
        super().__init__()

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        return tokens * self.per_element


@register("activation", "gelu")
class Gelu(Activation):
    """x * (1 + erf(x / sqrt 2)) / 2."""

    per_element = Ops(mul=3, add=1, erf=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


@register("activation", "gelu_new")
class GeluTanh(Activation):
    """GELU by a tanh, as GPT-2 has it."""

    per_element = Ops(mul=6, add=2, tanh=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


@register("activation", "relu")
class Relu(Activation):
    """max(x, 0)."""

    per_element = Ops(max=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@register("activation", "squared_relu")
class SquaredRelu(Activation):
    """max(x, 0)^2 (arXiv 2109.08668)."""

    per_element = Ops(max=1, mul=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@register("activation", "silu")
class Silu(Activation):
    """x / (1 + e^-x)."""

    per_element = Ops(exp=1, add=1, div=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class TransformersActivation(Activation):
    """A function of `transformers.activations.ACT2FN`, whose operations nobody counted."""

    name: str

    def __init__(self, config: Any = None, layer_idx: int = 0):
        super().__init__()
        self.function: nn.Module = ACT2FN[self.name].to(torch.get_default_dtype())  # xIELU would be in bfloat16

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        if self.name not in COUNTED:
            own = [name for name, cls in VARIANTS["activation"].items() if hasattr(cls, "per_element")]
            raise ValueError(
                f"activation_variant={self.name!r}: nobody counted its operations. Those with a count: "
                f"{', '.join(sorted({*own, *COUNTED}))}."
            )
        return tokens * COUNTED[self.name]


SIGMOID = Ops(exp=1, add=1, div=1)
COUNTED = {
    **dict.fromkeys(("gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), GeluTanh.per_element),
    "gelu_python": Gelu.per_element,
    "hardswish": Ops(add=1, max=2, mul=2),
    "leaky_relu": Ops(max=1, mul=1),
    "linear": Ops(),
    "mish": Ops(exp=1, add=1, log=1, tanh=1, mul=1),
    "prelu": Ops(max=1, mul=1),
    "quick_gelu": SIGMOID + Ops(mul=2),
    "relu2": SquaredRelu.per_element,
    "relu6": Ops(max=2),
    "sigmoid": SIGMOID,
    "swish": Silu.per_element,
    "tanh": Ops(tanh=1),
}


for _name in ACT2FN:
    if _name not in VARIANTS["activation"]:
        register("activation", _name)(type(f"ACT2FN[{_name!r}]", (TransformersActivation,), {"name": _name}))


def build_activation(config: Any, layer_idx: int, default: str) -> nn.Module:
    """The activation of a layer; `default` where the configuration leaves it to the MLP."""
    return variant("activation", config.of_layer("activation_variant", layer_idx) or default)(config, layer_idx)
