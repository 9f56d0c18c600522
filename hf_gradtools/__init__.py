"""Gradients as first-class objects of the Hugging Face stack.

Public names load on first use: `import hf_gradtools` itself imports neither torch nor transformers. It
makes GRIT known to PEFT, and our models to transformers, as soon as those are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hf_gradtools._registration import install


__version__ = "0.1.0.dev0"

_LAZY = {
    "ActivationStore": "hf_gradtools.sae",
    "GhostDotProd": "hf_gradtools.ghost",
    "GhostDotProdCallback": "hf_gradtools.ghost",
    "GhostDotProdConfig": "hf_gradtools.ghost",
    "GradMemConfig": "hf_gradtools.gradmem",
    "GradMemGPTForCausalLM": "hf_gradtools.gradmem",
    "GradMemory": "hf_gradtools.gradmem",
    "GradProjCallback": "hf_gradtools.ghost",
    "GradProjConfig": "hf_gradtools.ghost",
    "GradProjector": "hf_gradtools.ghost",
    "GradientEnsemble": "hf_gradtools.ghost",
    "GradientStore": "hf_gradtools.ghost",
    "GritCallback": "hf_gradtools.grit",
    "GritConfig": "hf_gradtools.grit",
    "GritController": "hf_gradtools.grit",
    "GritModel": "hf_gradtools.grit",
    "GritTrainer": "hf_gradtools.grit",
    "HallucinationDetector": "hf_gradtools.ghosttrack",
    "ModelActivations": "hf_gradtools.sae",
    "NanoGPTConfig": "hf_gradtools.nanogpt",
    "NanoGPTForCausalLM": "hf_gradtools.nanogpt",
    "NanoGPTModel": "hf_gradtools.nanogpt",
    "SAE": "hf_gradtools.sae",
    "SAEConfig": "hf_gradtools.sae",
    "SAETrainer": "hf_gradtools.sae",
    "SAETrainingConfig": "hf_gradtools.sae",
    "export_lora": "hf_gradtools.grit",
    "get_gradmem_model": "hf_gradtools.gradmem",
    "ghost_values": "hf_gradtools.ghost",
    "hardware_report": "hf_gradtools.nanogpt",
    "load_ghost_dataset": "hf_gradtools.ghost",
    "steer": "hf_gradtools.sae",
    "token_blocks": "hf_gradtools.sae",
}

__all__ = [
    "SAE",
    "ActivationStore",
    "GhostDotProd",
    "GhostDotProdCallback",
    "GhostDotProdConfig",
    "GradMemConfig",
    "GradMemGPTForCausalLM",
    "GradMemory",
    "GradProjCallback",
    "GradProjConfig",
    "GradProjector",
    "GradientEnsemble",
    "GradientStore",
    "GritCallback",
    "GritConfig",
    "GritController",
    "GritModel",
    "GritTrainer",
    "HallucinationDetector",
    "ModelActivations",
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTModel",
    "SAEConfig",
    "SAETrainer",
    "SAETrainingConfig",
    "__version__",
    "export_lora",
    "get_gradmem_model",
    "ghost_values",
    "hardware_report",
    "load_ghost_dataset",
    "steer",
    "token_blocks",
]

if TYPE_CHECKING:
    from hf_gradtools.ghost import (
        GhostDotProd,
        GhostDotProdCallback,
        GhostDotProdConfig,
        GradientEnsemble,
        GradientStore,
        GradProjCallback,
        GradProjConfig,
        GradProjector,
        ghost_values,
        load_ghost_dataset,
    )
    from hf_gradtools.ghosttrack import HallucinationDetector
    from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM, GradMemory, get_gradmem_model
    from hf_gradtools.grit import GritCallback, GritConfig, GritController, GritModel, GritTrainer, export_lora
    from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel, hardware_report
    from hf_gradtools.sae import (
        SAE,
        ActivationStore,
        ModelActivations,
        SAEConfig,
        SAETrainer,
        SAETrainingConfig,
        steer,
        token_blocks,
    )


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_gradtools' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


install()
