"""Decoder-only language models whose parts are chosen by name, and what they cost in hardware.

Names load on first use: transformers' Auto classes know this package without importing a model.
"""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


_LAZY = {
    "Component": "components",
    "HardwareReport": "hardware",
    "NanoGPTConfig": "configuration_nanogpt",
    "NanoGPTForCausalLM": "modeling_nanogpt",
    "NanoGPTModel": "modeling_nanogpt",
    "TokenFolder": "data",
    "VARIANTS": "components",
    "hardware_report": "hardware",
    "register": "components",
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

__getattr__ = lazy_names(__name__, _LAZY)
