"""Options of `gradmem eval` and `gradmem plot`. Imports nothing heavy, so that the command line can show them."""

from __future__ import annotations

from dataclasses import dataclass, field


__all__ = ["EvalOptions", "PlotOptions"]


@dataclass
class EvalOptions:
    """A trained model, and what it is asked.

    Args:
        model: folder or Hub id of a model with a memory, or of one that reads prompts.
        data_path: name of a task such as "N2-K1V1-V4", or a folder made by `hf-gradtools gradmem data`.
        tokenizer_path: folder of a tokenizer; default the model's.
        K: gradient steps of a write; several are evaluated one by one; default the model's own.
        rows: how many are asked.
        per_device_batch_size: rows in a batch.
        max_context_length: tokens kept of each context.
        generation: also answer by greedy generation.
        wrong_context: also with the context of another row, which should give what a guess does.
        seed: of the rows of a named task; another than the training run's gives other rows.
        out: JSON file to write.
        device: "auto" or "cpu".

    Raises:
        ValueError: an option is out of range.
    """

    model: str
    data_path: str
    tokenizer_path: str | None = None
    K: list[int] = field(default_factory=list)
    rows: int = 1000
    per_device_batch_size: int = 64
    max_context_length: int | None = None
    generation: bool = True
    wrong_context: bool = True
    seed: int = 0
    out: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("rows", "per_device_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device={self.device!r} is unknown. Pass auto or cpu.")


@dataclass
class PlotOptions:
    """What is compared, and where figures go.

    Args:
        results: folders of runs, files of `gradmem eval`, or `.jsonl` files of the benchmark.
        metric: of the results, such as exact_match or generated_exact_match.
        out: figure of the metric against the number of pairs, such as accuracy.png.
        cost_of: folder or Hub id of a model with a memory, whose operations per answer are counted.
        K: steps of its write; default its own.
        queries: how many a context is asked.
        lengths: tokens of the context.
        query_tokens: tokens of a query and its answer.
        answer_tokens: these of the answer.
        cost_out: figure of the operations against the length of the context.

    Raises:
        ValueError: there is nothing to compare, or a number is out of range.
    """

    results: list[str] = field(default_factory=list)
    metric: str = "exact_match"
    out: str | None = None
    cost_of: str | None = None
    K: int | None = None
    queries: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    lengths: list[int] = field(default_factory=lambda: [2**i for i in range(4, 15)])
    query_tokens: int = 8
    answer_tokens: int = 4
    cost_out: str | None = None

    def __post_init__(self) -> None:
        if not self.results and self.cost_of is None:
            raise ValueError("results=[] and cost_of=None leave nothing to do. Pass one of them.")
        if self.out is not None and not self.results:
            raise ValueError(f"out={self.out!r} draws results, and there are none. Pass results=.")
        if self.cost_out is not None and self.cost_of is None:
            raise ValueError(f"cost_out={self.cost_out!r} draws the cost of a model. Pass cost_of=.")
        if min([*self.queries, *self.lengths, self.answer_tokens], default=0) < 1:
            raise ValueError("queries, lengths and answer_tokens must be at least 1, and at least one of each given.")
        if self.query_tokens <= self.answer_tokens:
            raise ValueError(f"query_tokens={self.query_tokens} must be more than answer_tokens={self.answer_tokens}.")
