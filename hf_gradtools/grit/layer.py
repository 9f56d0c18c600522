"""A LoRA layer as GRIT sees it: two matrices `A [R, I]`, `B [O, R]` that can be measured and resized."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import Parameter


@dataclass(frozen=True)
class SteeredLayer:
    """One adapter of one LoRA layer.

    Attributes:
        name: of the layer in the base model, as `rank_pattern` knows it.
        module: the PEFT layer.
        adapter: name of the adapter.
    """

    name: str
    module: LoraLayer
    adapter: str

    @property
    def down(self) -> nn.Linear:
        """The module of A: its output is the rank space."""
        return self.module.lora_A[self.adapter]

    @property
    def up(self) -> nn.Linear:
        """The module of B."""
        return self.module.lora_B[self.adapter]

    @property
    def A(self) -> Parameter:  # noqa: N802 - the paper's letters
        return self.down.weight

    @property
    def B(self) -> Parameter:  # noqa: N802
        return self.up.weight

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def size(self) -> int:
        """Parameters of A and B."""
        return self.A.numel() + self.B.numel()

    def resize(self, A: Tensor, B: Tensor) -> tuple[Parameter, Parameter]:  # noqa: N803
        """Puts matrices of another rank in place, as new parameters (graphs of the old ones may still be alive).

        The scale `s` of `ΔW = s·B·A` stays, so `lora_alpha` becomes what reloading computes it from.
        """
        rank = A.shape[0]
        self.down.weight = Parameter(A.to(self.A).contiguous(), requires_grad=self.A.requires_grad)
        self.up.weight = Parameter(B.to(self.B).contiguous(), requires_grad=self.B.requires_grad)
        self.down.out_features = self.up.in_features = rank
        unit = math.sqrt(rank) if self.module.use_rslora[self.adapter] else rank
        alpha = self.module.scaling[self.adapter] * unit
        self.module.r[self.adapter] = rank
        self.module.lora_alpha[self.adapter] = alpha
        self.module.scaling[self.adapter] = alpha / unit  # to the last bit what a reloaded adapter has
        return self.A, self.B


def steered_layers(model: nn.Module, adapter: str) -> list[SteeredLayer]:
    """The layers of an adapter that GRIT can steer: plain and DoRA adapters of linear layers.

    Adapters of embeddings, convolutions and bare parameters, and LoRA variants with a structure of their own, train as
    in LoRA.

    Args:
        model: a `PeftModel`, its tuner, or a model with injected adapters.
        adapter: its name.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base = base.model if isinstance(base, BaseTuner) else base
    return [
        SteeredLayer(name, module, adapter)
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and _is_steerable(module, adapter)
    ]


def _is_steerable(module: LoraLayer, adapter: str) -> bool:
    if isinstance(module, ParamWrapper) or adapter not in module.lora_A:
        return False
    variant = module.lora_variant.get(adapter)
    plain = variant is None or isinstance(variant, DoraLinearVariant)
    return plain and type(module.lora_A[adapter]) is nn.Linear and type(module.lora_B[adapter]) is nn.Linear
