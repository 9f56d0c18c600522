"""Sparse autoencoders of a causal LM's hidden states.

Names load on first use.
"""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


_LAZY = {
    "ActivationStore": "store",
    "ModelActivations": "streaming",
    "SAE": "modeling_sae",
    "SAEConfig": "configuration_sae",
    "SAEOutput": "modeling_sae",
    "SAETrainer": "trainer",
    "SAETrainingConfig": "training_config",
    "TensorActivations": "in_memory",
    "evaluate": "metrics",
    "extract": "extraction",
    "hold_out_tokens": "held_out",
    "load_many": "saving",
    "save_many": "saving",
    "steer": "interventions",
    "token_blocks": "packing",
}

__all__ = [
    "SAE",
    "ActivationStore",
    "ModelActivations",
    "SAEConfig",
    "SAEOutput",
    "SAETrainer",
    "SAETrainingConfig",
    "TensorActivations",
    "evaluate",
    "extract",
    "hold_out_tokens",
    "load_many",
    "save_many",
    "steer",
    "token_blocks",
]

if TYPE_CHECKING:
    from hf_gradtools.sae.configuration_sae import SAEConfig
    from hf_gradtools.sae.extraction import extract
    from hf_gradtools.sae.held_out import hold_out_tokens
    from hf_gradtools.sae.in_memory import TensorActivations
    from hf_gradtools.sae.interventions import steer
    from hf_gradtools.sae.metrics import evaluate
    from hf_gradtools.sae.modeling_sae import SAE, SAEOutput
    from hf_gradtools.sae.packing import token_blocks
    from hf_gradtools.sae.saving import load_many, save_many
    from hf_gradtools.sae.store import ActivationStore
    from hf_gradtools.sae.streaming import ModelActivations
    from hf_gradtools.sae.trainer import SAETrainer
    from hf_gradtools.sae.training_config import SAETrainingConfig

__getattr__ = lazy_names(__name__, _LAZY)
