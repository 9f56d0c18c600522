"""Decoder-only language models whose parts are chosen by name, and what they cost in hardware.

Names load on first use: transformers' Auto classes know this package without importing a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING


_LAZY = {
    "Component": "hf_gradtools.nanogpt.components",
    "HardwareReport": "hf_gradtools.nanogpt.hardware",
    "NanoGPTConfig": "hf_gradtools.nanogpt.configuration_nanogpt",
    "NanoGPTForCausalLM": "hf_gradtools.nanogpt.modeling_nanogpt",
    "NanoGPTModel": "hf_gradtools.nanogpt.modeling_nanogpt",
    "TokenFolder": "hf_gradtools.nanogpt.data",
    "VARIANTS": "hf_gradtools.nanogpt.components",
    "hardware_report": "hf_gradtools.nanogpt.hardware",
    "register": "hf_gradtools.nanogpt.components",
}

__all__ = [
    "VARIANTS",
    "Component",
    "HardwareReport",
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTModel",
    "TokenFolder",
    "hardware_report",
    "register",
]

if TYPE_CHECKING:
    from hf_gradtools.nanogpt.components import VARIANTS, Component, register
    from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
    from hf_gradtools.nanogpt.data import TokenFolder
    from hf_gradtools.nanogpt.hardware import HardwareReport, hardware_report
    from hf_gradtools.nanogpt.modeling_nanogpt import NanoGPTForCausalLM, NanoGPTModel


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_gradtools.nanogpt' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
