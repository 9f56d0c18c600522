"""Options of `hf-gradtools ghost project` and `search`. Imports nothing heavy, so that they are shown at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_gradtools.ghost.gradproj.config import AUTO, DTYPES, GradProjConfig, Rank
from hf_gradtools.workflow.options import DataOptions


__all__ = ["ProjectConfig", "SearchConfig", "parse_rank"]

FULL = "full"  # a side that is not projected
METRICS, REDUCTIONS = ("cosine", "dot"), (None, "mean", "max")
PRECONDITIONERS = ("none", "fisher", "adam")


@dataclass
class ProjectConfig(DataOptions):
    """A causal LM, the rows whose gradients are projected, and how.

    Everything of [`DataOptions`] applies.

    Args:
        checkpoint: folders of Trainer checkpoints of the model, or of adapters on it; each gets a store of its own.
        rank: "auto", an int, or "k_in,k_out" where "full" keeps a side whole.
        layers: "all-linear", "all", or regular expressions of module names.
        store_dtype: of the stored numbers.
        proj_rank_total, stages, basis, seed, on_uncovered: see [`~hf_gradtools.ghost.gradproj.config.GradProjConfig`].

    Raises:
        ValueError: a number is out of range.
    """

    free: ClassVar[set[str]] = {"output_dir", "batch_size", "checkpoint", "on_uncovered"}

    checkpoint: list[str] = field(default_factory=list)
    proj_rank_total: int | None = None
    rank: str | None = None
    stages: int = 2
    basis: str = "orthonormal"
    layers: list[str] = field(default_factory=lambda: ["all-linear"])
    store_dtype: str = "float16"
    on_uncovered: str = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.store_dtype not in DTYPES:
            raise ValueError(f"store_dtype={self.store_dtype!r} is unknown. Pass one of {', '.join(DTYPES)}.")
        self.projection()

    def projection(self) -> GradProjConfig:
        """What is stored of each gradient."""
        shared: dict[str, Any] = {
            name: getattr(self, name) for name in ("proj_rank_total", "stages", "basis", "seed", "on_uncovered")
        }
        named: dict[tuple[str, ...], str | None] = {("all-linear",): "all-linear", ("all",): None}
        layers: Sequence[str] | str | None = named.get(tuple(self.layers), self.layers)
        return GradProjConfig(**shared, layers=layers, rank=parse_rank(self.rank), dtype=self.store_dtype)  # type: ignore[arg-type]


@dataclass
class SearchConfig:
    """What is searched for in the gradients that `hf-gradtools ghost project` left in a folder.

    Args:
        output_dir: of `project`.
        query: texts.
        query_response: the responses to them, of rows that are prompts and responses.
        query_dataset: rows like those of the corpus.
        query_split: split of that, default "train".
        top_k: rows for each query.
        metric: "cosine" or "dot".
        precondition: "none", "fisher" or "adam".
        damping: of the Fisher matrix, as a share of its mean eigenvalue.
        reduce: one answer for all queries: by "mean" or "max" of their scores.
        optimizer_state: checkpoint with `optimizer.pt`, for "adam"; default that of each store.
        model: in the place of the one that was projected, which has moved.

    Raises:
        ValueError: there is no query, or an option is unknown.
    """

    output_dir: str
    query: list[str] = field(default_factory=list)
    query_response: list[str] = field(default_factory=list)
    query_dataset: str | None = None
    query_split: str | None = None
    top_k: int = 10
    metric: str = "cosine"
    precondition: str = "none"
    damping: float = 0.1
    reduce: str | None = None
    optimizer_state: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if bool(self.query) == bool(self.query_dataset):
            raise ValueError("pass either query='some text', as often as you like, or query_dataset=rows.")
        if self.query_response and len(self.query_response) != len(self.query):
            raise ValueError(
                f"query_response={self.query_response[0]!r} is one of {len(self.query_response)} for "
                f"{len(self.query)} queries. Pass one for each, or none."
            )
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1.")
        choices = {"metric": METRICS, "precondition": PRECONDITIONERS, "reduce": REDUCTIONS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(filter(None, known))}."
                )
        if self.optimizer_state and self.precondition != "adam":
            raise ValueError(f"optimizer_state={self.optimizer_state!r} is only read with precondition='adam'.")


def parse_rank(text: str | None) -> Rank:
    """`"auto"`, `"64"`, `"8,16"` or `"full,16"` as [`GradProjConfig`] takes them; ValueError for anything else."""
    if text is None:
        return None
    if text == AUTO:
        return "auto"
    sides = [None if side.strip() == FULL else side.strip() for side in text.split(",")]
    if len(sides) > 2 or any(side is not None and not side.isdecimal() for side in sides):
        raise ValueError(f"rank={text!r} is none of auto, 64, 8,16 (k_in,k_out) and full,16 (a whole side).")
    first, *last = (None if side is None else int(side) for side in sides)
    return first, (last or [first])[0]
