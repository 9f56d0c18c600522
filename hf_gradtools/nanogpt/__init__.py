"""Decoder-only language models whose parts are chosen by name, and what they cost in hardware."""

from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import NanoGPTForCausalLM, NanoGPTModel
from .registry import VARIANTS, register


__all__ = ["VARIANTS", "NanoGPTConfig", "NanoGPTForCausalLM", "NanoGPTModel", "register"]
