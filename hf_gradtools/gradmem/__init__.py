"""Causal LMs with a small memory that is written by a few gradient steps at test time.

Names load on first use: transformers' Auto classes know this package without importing a model.
"""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


_LAZY = {
    "GradMemConfig": "configuration_gradmem",
    "GradMemGPTForCausalLM": "modeling_gradmem",
    "GradMemory": "memory",
    "RMTConfig": "configuration_rmt",
    "RMTForCausalLM": "modeling_rmt",
    "get_gradmem_model": "wrapping",
}

__all__ = ["GradMemConfig", "GradMemGPTForCausalLM", "GradMemory", "RMTConfig", "RMTForCausalLM", "get_gradmem_model"]

if TYPE_CHECKING:
    from hf_gradtools.gradmem.configuration_gradmem import GradMemConfig
    from hf_gradtools.gradmem.configuration_rmt import RMTConfig
    from hf_gradtools.gradmem.memory import GradMemory
    from hf_gradtools.gradmem.modeling_gradmem import GradMemGPTForCausalLM
    from hf_gradtools.gradmem.modeling_rmt import RMTForCausalLM
    from hf_gradtools.gradmem.wrapping import get_gradmem_model

__getattr__ = lazy_names(__name__, _LAZY)
