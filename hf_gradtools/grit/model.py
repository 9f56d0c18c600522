"""`GritModel`: LoRA's tuner for PEFT, with ranks that differ from layer to layer and change while it trains."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.nn import Parameter

from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.layer import SteeredLayer, steered_layers


class GritModel(LoraModel):
    """The tuner that `get_peft_model(model, GritConfig(...))` puts around a model.

    Its forward is LoRA's. The Fisher information, and what is done with it, belongs to training:
    [`GritCallback`], [`GritTrainer`] or, in a loop of your own, [`GritController`].
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Training writes ranks into the config: a copy, so that the caller's makes the next adapter as this one began.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not steered_layers(self, adapter_name):
            config = self.peft_config[adapter_name]
            raise ValueError(
                f"target_modules={config.target_modules!r} holds no linear layer that GRIT can steer; embeddings, "
                "convolutions and bare parameters train as in LoRA beside at least one linear layer. "
                "Pass target_modules='all-linear', or use peft.LoraConfig."
            )

    def layers(self, adapter_name: str = "default") -> list[SteeredLayer]:
        """The layers of an adapter that GRIT steers."""
        return steered_layers(self, adapter_name)

    def resize(
        self,
        layer: SteeredLayer,
        A: Tensor,
        B: Tensor,  # noqa: N803 - the paper's letters
    ) -> tuple[Parameter, Parameter]:
        """Replaces the matrices of a layer by `A [K, I]` and `B [O, K]`, and records their rank in the config.

        Raises:
            ValueError: the adapter is merged into the base weights.
        """
        if layer.adapter in layer.module.merged_adapters:
            raise ValueError(f"adapter {layer.adapter!r} is merged; call unmerge_adapter() before its rank changes.")
        parameters = layer.resize(A, B)
        _record_rank(self.peft_config[layer.adapter], layer)
        return parameters

    def ranks(self, adapter_name: str = "default") -> dict[str, int]:
        """The rank of every layer."""
        return {layer.name: layer.rank for layer in self.layers(adapter_name)}

    def rank_report(self, adapter_name: str = "default") -> dict[str, Any]:
        """Ranks and parameters of an adapter, now and as it was created.

        Returns:
            `layers`: by name `rank`, `base_rank`, `parameters`; and `parameters`, `base_parameters`, `reduction` of
            all of them together.
        """
        config, layers = self.peft_config[adapter_name], {}
        for layer in self.layers(adapter_name):
            base_rank = initial_rank(config, layer.name)
            layers[layer.name] = {"rank": layer.rank, "base_rank": base_rank, "parameters": layer.size}
        before = sum(row["parameters"] * row["base_rank"] // row["rank"] for row in layers.values())
        after = sum(row["parameters"] for row in layers.values())
        return {"layers": layers, "parameters": after, "base_parameters": before, "reduction": 1 - after / before}

    def export_lora(self, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Writes a plain LoRA adapter with the same tensors, which PEFT loads without this package."""
        from hf_gradtools.grit.export import export_lora

        export_lora(self, path, adapter_name)

    # PEFT's internal hook for loading: save_and_load.py delegates the method-specific part to it.
    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GritConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gives the layers the ranks of the checkpoint first: a `Trainer` that resumes loads into an adapter that it
        has made at full rank."""
        for layer in steered_layers(model, adapter_name):
            A, B = (_stored(state_dict, f"{layer.name}.lora_{letter}.weight") for letter in "AB")  # noqa: N806
            if A is None or B is None:
                continue
            if A.shape[1] != layer.A.shape[1] or B.shape[0] != layer.B.shape[0]:
                raise ValueError(
                    f"the adapter was trained on another base model ({config.base_model_name_or_path}): its "
                    f"{layer.name} maps {A.shape[1]} to {B.shape[0]} features, here it maps {layer.A.shape[1]} to "
                    f"{layer.B.shape[0]}. Load it on the model that it names."
                )
            if A.shape[0] != layer.rank:
                layer.resize(A, B)
                _record_rank(config, layer)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def initial_rank(config: GritConfig, name: str) -> int:
    """The rank that the layer was created with."""
    pattern = config.initial_rank_pattern if config.initial_rank_pattern is not None else config.rank_pattern
    return int(next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), config.r))


def _record_rank(config: GritConfig, layer: SteeredLayer) -> None:
    """Notes rank and scale where PEFT reads them on loading; the first pattern that matches a name counts."""
    if config.initial_rank_pattern is None:
        config.initial_rank_pattern = dict(config.rank_pattern)
    key = f"^{re.escape(layer.name)}"
    config.rank_pattern = {key: layer.rank, **{k: v for k, v in config.rank_pattern.items() if k != key}}
    alpha = layer.module.lora_alpha[layer.adapter]
    config.alpha_pattern = {key: alpha, **{k: v for k, v in config.alpha_pattern.items() if k != key}}


def _stored(state_dict: dict[str, Tensor], key: str) -> Tensor | None:
    return state_dict.get(f"base_model.model.{key}", state_dict.get(key))
