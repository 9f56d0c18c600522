"""What `inspect`, `stats` and `softmax` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


__all__ = ["InspectOptions", "SoftmaxOptions", "StatsOptions"]


@dataclass
class InspectOptions:
    """Checkpoints below a folder, by validation loss.

    Args:
        directory: folder with runs: of `train`, of any Trainer, or nanoGPT's with a ckpt.pt.
        path_regex: only paths in which this regular expression is found.
        sort: loss, path, iter or params.
        reverse: the other way round.
        output: write the table to a .csv or .json file, too.
    """

    directory: str = "."
    path_regex: str | None = None
    sort: str = "loss"
    reverse: bool = False
    output: str | None = None


@dataclass
class StatsOptions:
    """Standard deviation, kurtosis and largest value of weights, and of activations on a text.

    Args:
        out_dir: a trained causal LM: folder or Hub id; or a folder with a nanoGPT ckpt.pt.
        tokenizer: folder or Hub id of a tokenizer, or a prepared dataset; default the model's own.
        text: text to run the model on, or `FILE:text.txt`.
        dataset: run it on the validation tokens of a prepared dataset instead.
        max_tokens: tokens of the text or the dataset, at most.
        modules: names of modules, or patterns such as *.mlp; default those without children.
        batch_size: blocks in a forward.
        block_size: tokens in a block; default what the model was trained on.
        output: write the rows to a .csv or .json file, too.
        html: write a page.
        figure: write a figure, such as stats.png; activations go beside it, with _activations before the ending.
        device: cpu, cuda, ...; default the first there is.
        dtype: of the weights: auto (as stored), float32, bfloat16 or float16.

    Raises:
        ValueError: a number is out of range, or two choices exclude each other.
    """

    out_dir: str = "out"
    tokenizer: str | None = None
    text: str | None = None
    dataset: str | None = None
    max_tokens: int = 16384
    modules: list[str] | None = None
    batch_size: int = 8
    block_size: int | None = None
    output: str | None = None
    html: str | None = None
    figure: str | None = None
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "block_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.text is not None and self.dataset is not None:
            raise ValueError(f"dataset={self.dataset!r} and a text exclude each other; pass one of them.")


@dataclass
class SoftmaxOptions:
    """Weights that softmax variants make of one row of scores.

    Args:
        scores: the row; default 41 scores from -5 to 5.
        variants: names; default all.
        config: options of the variants, as JSON: '{"consmax_initial_gamma": 10}'.
        figure: write a figure, such as softmax.png.
        output: write the weights to a .csv or .json file, too.
    """

    scores: list[float] = field(default_factory=lambda: [i / 4 - 5 for i in range(41)])
    variants: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    figure: str | None = None
    output: str | None = None
