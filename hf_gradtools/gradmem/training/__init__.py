"""Training and evaluation of gradient memories on KV retrieval: options, exact resume, curriculum, baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


if TYPE_CHECKING:
    from hf_gradtools.gradmem.training.evaluation import evaluate_batches
    from hf_gradtools.gradmem.training.options import TrainOptions
    from hf_gradtools.gradmem.training.stages import Stage
    from hf_gradtools.gradmem.training.trainer import GradMemTrainer
    from hf_gradtools.gradmem.training.workflow import train

__all__ = ["GradMemTrainer", "Stage", "TrainOptions", "evaluate_batches", "train"]

# The command lines import options from here, and must not wait for Trainer.
_MODULES = {
    "GradMemTrainer": "trainer",
    "Stage": "stages",
    "TrainOptions": "options",
    "evaluate_batches": "evaluation",
    "train": "workflow",
}

__getattr__ = lazy_names(__name__, _MODULES)
