"""Keeps bitsandbytes' 4-bit layers differentiable while validation passes run in eval mode on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def keep_quantized_gradients(model: nn.Module) -> Callable[[], None]:
    """Switches off the inference repacking of `Linear4bit` on CPUs; returns what switches it back on.

    Since bitsandbytes 0.49 an eval-mode forward on a CPU with AVX512-BF16 repacks the weights for a kernel without
    backward, and `.train()` does not unpack them: adapter gradients are then wrong by more than half, with no error.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")  # a model that has its layers has imported it
    if bitsandbytes is None:
        return lambda: None
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit) and module.support_avx512bf16_for_cpu
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False

    def restore() -> None:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True

    return restore
