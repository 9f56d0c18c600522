"""Text from a trained model, coloured by its confidence, and its scores on benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.sampling.benchmarks import evaluate_tasks, harness_model, result_rows
    from hf_gradtools.nanogpt.sampling.colors import intensity_to_rgb, token_intensities, token_ranks
    from hf_gradtools.nanogpt.sampling.generation import Sample, encode_prompt, generate_samples
    from hf_gradtools.nanogpt.sampling.heatmap import top_tokens
    from hf_gradtools.nanogpt.sampling.options import SampleOptions
    from hf_gradtools.nanogpt.sampling.segments import Segment, segment_tokens

__all__ = [
    "Sample",
    "SampleOptions",
    "Segment",
    "encode_prompt",
    "evaluate_tasks",
    "generate_samples",
    "harness_model",
    "intensity_to_rgb",
    "result_rows",
    "segment_tokens",
    "token_intensities",
    "token_ranks",
    "top_tokens",
]

# The command lines import options from here, and must not wait for transformers.
_MODULES = {
    "Sample": "generation",
    "SampleOptions": "options",
    "Segment": "segments",
    "encode_prompt": "generation",
    "evaluate_tasks": "benchmarks",
    "generate_samples": "generation",
    "harness_model": "benchmarks",
    "intensity_to_rgb": "colors",
    "result_rows": "benchmarks",
    "segment_tokens": "segments",
    "token_intensities": "colors",
    "token_ranks": "colors",
    "top_tokens": "heatmap",
}

__getattr__ = lazy_names(__name__, _MODULES)
