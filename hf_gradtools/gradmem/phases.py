"""What is different in a backbone while it writes, and how it comes back to what it was."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .attention import TWICE_DIFFERENTIABLE


WRITE_ADAPTER = "write"
ONE_THREAD = threading.RLock()  # who holds it may change settings of models, or rely on them


@contextmanager
def set_for_now(targets: list[tuple[object, str, object]]) -> Iterator[None]:
    """Sets attributes `(object, name, value)`; they come back afterwards, whatever happens.

    Wants [`ONE_THREAD`], from the time on when the settings are made.
    """
    before = [(target, name, getattr(target, name)) for target, name, _ in targets]
    try:
        for target, name, value in targets:
            setattr(target, name, value)
        yield
    finally:
        for target, name, value in reversed(before):
            setattr(target, name, value)


def keep_weights(module: nn.Module) -> None:
    """Has transformers leave the weights as they are: those of adapters, trained or not, it would draw anew."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    for part in module.modules():
        part._is_hf_initialized = True


def check_whole(module: nn.Module) -> None:
    """ValueError if gradients cannot come back through a write: parameters are copies, or not all here.

    Recomputed steps ask autograd for the gradients of the parameters themselves, which a layer that gathers its own
    would leave without.
    """
    kind = "torch.nn.DataParallel" if getattr(module, "_is_replica", False) else None
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            kind = "FSDP or tensor parallelism"
        elif hasattr(parameter, "ds_id"):  # DeepSpeed marks what it partitions in no other way
            kind = "DeepSpeed ZeRO-3"
    if kind is not None:
        raise ValueError(
            f"GradMem cannot be trained under {kind}: gradients of a write need every parameter whole on each device. "
            "Use DistributedDataParallel, by torchrun or accelerate launch."
        )


def frozen(module: nn.Module) -> list[tuple[object, str, object]]:
    """Settings with which nothing keeps what a gradient of the parameters would need."""
    return [(parameter, "requires_grad", False) for parameter in module.parameters() if parameter.requires_grad]


def without_checkpointing(module: nn.Module) -> list[tuple[object, str, object]]:
    """Settings without gradient checkpointing: a graph of the gradient would keep what it computes again."""
    return [
        (m, "gradient_checkpointing", False) for m in module.modules() if getattr(m, "gradient_checkpointing", False)
    ]


def twice_differentiable(backbone: PreTrainedModel) -> list[tuple[object, str, object]]:
    """Settings with which attention has a second derivative."""
    if backbone.config._attn_implementation == "eager":
        return []
    implementation = TWICE_DIFFERENTIABLE if backbone._supports_attention_backend else "eager"
    return [(backbone.config, "_attn_implementation", implementation)]


def with_write_lora(module: nn.Module) -> list[tuple[object, str, object]]:
    """Settings with which the adapters for writing are active beside those that are.

    PEFT's own `set_adapter` changes which parameters train as well, which must not change in between.
    """
    return [(layer, "_active_adapter", [*layer.active_adapters, WRITE_ADAPTER]) for layer in _write_layers(module)]


def add_adapter(backbone: PreTrainedModel, config: PeftConfig, name: str) -> None:
    """Gives the backbone the layers of an adapter; what trained or was active before still is."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    active = [(layer, list(layer.active_adapters)) for layer in _adapted_layers(backbone)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what we want
        inject_adapter_in_model(config, backbone, adapter_name=name)
    for layer, names in active:
        layer._active_adapter = names
    for parameter in trained:
        parameter.requires_grad_(True)


def add_write_lora(
    backbone: PreTrainedModel, rank: int, alpha: int, dropout: float, target_modules: list[str] | str | None
) -> None:
    """Gives the backbone LoRA adapters (arXiv 2106.09685) that are inactive until it writes.

    Raises:
        ValueError: there is no such layer.
    """
    targets = "all-linear" if target_modules is None else target_modules
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),
        task_type="CAUSAL_LM",
    )
    add_adapter(backbone, config, WRITE_ADAPTER)
    for layer in _write_layers(backbone):
        layer._active_adapter = [name for name in layer.active_adapters if name != WRITE_ADAPTER]


def _write_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in _adapted_layers(module) if WRITE_ADAPTER in layer._get_available_adapters()]


def _adapted_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
