"""What `sample` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


__all__ = ["MODES", "SampleOptions"]

MODES = ("softmax", "softmax_top_k", "minmax", "rank", "topk", "all")
FILE = "FILE:"
DTYPES = ("auto", "float32", "bfloat16", "float16")
SMALLEST_TEMPERATURE = 1e-4  # logits over it stay finite in float32


@dataclass
class SampleOptions:
    """Text from a trained model, coloured by its confidence; scores on benchmarks.

    Args:
        out_dir: a trained causal LM with its tokenizer: a folder, of `train` or any other, or a Hub id; or a folder
            with a nanoGPT `ckpt.pt`.
        init_from: `resume` samples from `out_dir`; else a Hub id or folder, such as gpt2.
        tokenizer: folder or Hub id of a tokenizer, or a prepared dataset; default the model's own.
        start: text that samples continue, or `FILE:prompt.txt`.
        num_samples: samples to draw.
        max_new_tokens: tokens in each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens may follow; several values draw samples for each; 0 allows all.
        top_p: only the likeliest tokens whose probabilities reach this sum.
        softmax_threshold: only tokens at least this share as likely as the likeliest; overrides `top_k`.
        stop_strings: a sample ends where it has written one of these.
        seed: of the draws.
        batch_size: samples drawn at once.
        block_size: tokens of context; default what the model was trained on.
        crop_context: beyond `block_size` tokens, show the model the last ones only, as nanoGPT does; without it the
            cache grows on, for models that extrapolate.
        device: cpu, cuda, ...; default the first there is.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.
        print_model_info: say what the model is.
        token_boundary: text put between tokens in print.
        colorize_output: colour each token by the model's confidence, in the terminal and in an HTML file.
        colorize_mode: softmax (probability under the model), softmax_top_k (probability it was drawn with), minmax
            (logit, within the text), rank, topk (a table of the likeliest tokens of each step) or all.
        colorize_topk: tokens in a row of `topk` and of heatmaps.
        show_heatmaps: write PNG and HTML heatmaps of the likeliest tokens of each step.
        charts_dir: where HTML and heatmaps go; default `charts` in `out_dir`, or here for a Hub id.
        sample_file: text file to which samples are added.
        lm_eval_tasks: tasks of lm-evaluation-harness to score the model on, instead of samples: task1,task2.
        lm_eval_include_path: folder with task YAMLs of your own.
        lm_eval_output: JSON file of the scores; default `lm_eval.json` in `charts_dir`.
        lm_eval_limit: documents of each task, at most.
        lm_eval_batch_size: rows in one forward.

    Raises:
        ValueError: a number is out of range, or a choice unknown.
    """

    out_dir: str = "out"
    init_from: str = "resume"
    tokenizer: str | None = None
    start: str = "\n"
    num_samples: int = 3
    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: list[int] = field(default_factory=lambda: [200])
    top_p: float = 1.0
    softmax_threshold: float | None = None
    stop_strings: list[str] = field(default_factory=list)
    seed: int = 1337
    batch_size: int = 16
    block_size: int | None = None
    crop_context: bool = True
    device: str | None = None
    dtype: str = "auto"
    print_model_info: bool = False
    token_boundary: str | None = None
    colorize_output: bool = False
    colorize_mode: str = "minmax"
    colorize_topk: int = 10
    show_heatmaps: bool = False
    charts_dir: str | None = None
    sample_file: str | None = None
    lm_eval_tasks: str | None = None
    lm_eval_include_path: str | None = None
    lm_eval_output: str | None = None
    lm_eval_limit: int | None = None
    lm_eval_batch_size: int = 8

    def __post_init__(self) -> None:
        self.top_k = list(dict.fromkeys([self.top_k] if isinstance(self.top_k, int) else self.top_k))
        least = {
            "num_samples": 1, "max_new_tokens": 1, "temperature": 0, "batch_size": 1, "block_size": 1,
            "colorize_topk": 1, "lm_eval_limit": 1, "lm_eval_batch_size": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            if (value := getattr(self, name)) is not None and not value >= smallest:  # NaN too
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature} overflows; 0 takes the likeliest token each time.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2^63.")
        if "" in self.stop_strings:
            raise ValueError("stop_strings: an empty one stops everywhere. Leave it out.")
        if not self.top_k or min(self.top_k) < 0:
            raise ValueError(f"top_k={self.top_k} must be numbers of at least 0; 0 allows all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1.")
        if self.softmax_threshold is not None and not 0 <= self.softmax_threshold <= 1:
            raise ValueError(f"softmax_threshold={self.softmax_threshold} must be between 0 and 1.")
        if self.colorize_mode not in MODES:
            raise ValueError(f"colorize_mode={self.colorize_mode!r} is unknown; pass one of {', '.join(MODES)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; pass one of {', '.join(DTYPES)}.")

    @property
    def source(self) -> str:
        """The folder or Hub id that is loaded."""
        return self.out_dir if self.init_from == "resume" else self.init_from

    @property
    def modes(self) -> list[str]:
        """The ways to colour each sample."""
        return [mode for mode in MODES if mode != "all"] if self.colorize_mode == "all" else [self.colorize_mode]

    def charts(self) -> Path:
        """The folder of HTML and figures."""
        if self.charts_dir is not None:
            return Path(self.charts_dir)
        return Path(self.source) / "charts" if Path(self.source).is_dir() else Path("charts")

    def start_text(self) -> str:
        """The text that samples continue; ValueError if its file cannot be read."""
        if not self.start.startswith(FILE):
            return self.start
        path = Path(self.start.removeprefix(FILE)).expanduser()
        try:
            return path.read_bytes().decode()  # as it is: reading as text would translate line ends
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"start={self.start!r} cannot be read: {error}. Pass FILE: and a UTF-8 text.") from error
