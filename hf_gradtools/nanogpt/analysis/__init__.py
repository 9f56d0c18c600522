"""What checkpoints, weights and activations look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.analysis.checkpoints import Checkpoint, find_checkpoints, read_checkpoint
    from hf_gradtools.nanogpt.analysis.moments import Moments
    from hf_gradtools.nanogpt.analysis.plots import plot_softmax, plot_statistics, write_statistics_page
    from hf_gradtools.nanogpt.analysis.softmax import softmax_weights
    from hf_gradtools.nanogpt.analysis.statistics import activation_statistics, block_batches, weight_statistics

__all__ = [
    "Checkpoint",
    "Moments",
    "activation_statistics",
    "block_batches",
    "find_checkpoints",
    "plot_softmax",
    "plot_statistics",
    "read_checkpoint",
    "softmax_weights",
    "weight_statistics",
    "write_statistics_page",
]

# The command lines import options from here, and must not wait for transformers.
_MODULES = {
    "Checkpoint": "checkpoints",
    "Moments": "moments",
    "activation_statistics": "statistics",
    "block_batches": "statistics",
    "find_checkpoints": "checkpoints",
    "plot_softmax": "plots",
    "plot_statistics": "plots",
    "read_checkpoint": "checkpoints",
    "softmax_weights": "softmax",
    "weight_statistics": "statistics",
    "write_statistics_page": "plots",
}

__getattr__ = lazy_names(__name__, _MODULES)
