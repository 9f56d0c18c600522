"""Text from a trained model, coloured by its confidence, and its scores on benchmarks."""

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
