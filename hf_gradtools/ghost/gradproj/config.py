"""How gradients are projected. Imports nothing heavy, so that the command line can show the options at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


BASES = ("orthonormal", "gaussian", "rademacher", "pca")
REDUCTIONS = ("mean", "sum")
DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_DIM = 1024
AUTO = "auto"
AUTO_RANK = 64  # of both sides, on average

Rank = int | tuple[int | None, int | None] | Literal["auto"] | None


@dataclass
class GradProjConfig:
    """What is stored of every sample's gradient.

    Args:
        proj_rank_total: numbers stored per sample; default 1024. With one stage it is split over the parameters
            (equal shares, as square as the sides allow; what small ones cannot use goes to the others).
        rank: (k_in, k_out) of every weight's first stage, an int for both, None in the place of a side that is to
            stay whole: `(None, 16)` is one-sided, `(None, None)` the exact gradient. A vector of weights gets as many
            numbers as a matrix. Default "auto" with two stages: as many numbers as 64 on all sides would be, spent
            on the weights where the gradients of some samples are large. With one stage it takes the place of
            `proj_rank_total`.
        stages: 2 adds the first stage of all parameters into `proj_rank_total` numbers by a sparse sketch, 1 keeps
            them side by side.
        basis: "orthonormal", "gaussian" or "rademacher" are random and keep inner products in expectation; "pca"
            takes the main directions of activations and output gradients of some samples: closer, but not unbiased.
        layers: "all-linear", None for all parameters, or regular expressions of module names.
        seed: of everything random.
        loss_reduction: "mean" is the gradient of a sample's mean loss, as if trained on alone; "sum" of its sum.
        dtype: of the stored numbers.
        fit_samples: rows that "auto" ranks and "pca" bases are fitted on.
        on_uncovered: "error" or "warn" when the projections of a first batch do not account for all of its gradient
            as autograd has it, or rows have other gradients in a batch than alone; "ignore" saves these checks.
        on_nonfinite: "error" or "skip" when a sample's gradient is not finite; skipped samples of a dataset are
            stored as zeros, those of training batches not at all.

    Raises:
        ValueError: an option is out of range or does not go with another.
    """

    proj_rank_total: int | None = None
    rank: Rank = None
    stages: int = 2
    basis: Literal["orthonormal", "gaussian", "rademacher", "pca"] = "orthonormal"
    layers: str | Sequence[str] | None = "all-linear"
    seed: int = 0
    loss_reduction: Literal["mean", "sum"] = "mean"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    fit_samples: int = 32
    on_uncovered: Literal["error", "warn", "ignore"] = "error"
    on_nonfinite: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        self._check_choice("stages", (1, 2))
        self._check_choice("basis", BASES)
        self._check_choice("loss_reduction", REDUCTIONS)
        self._check_choice("dtype", DTYPES)
        self._check_choice("on_uncovered", ("error", "warn", "ignore"))
        self._check_choice("on_nonfinite", ("error", "skip"))
        self.rank = self._checked_rank()
        for name in ("proj_rank_total", "fit_samples"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be an int")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.rank == AUTO and self.stages == 1:
            raise ValueError("rank='auto' needs the second stage: pass stages=2, or a rank in numbers")
        if self.stages == 1 and self.rank is not None and self.proj_rank_total is not None:
            raise ValueError(
                f"proj_rank_total={self.proj_rank_total} and rank={self.rank} both say what one stage stores; pass "
                "one of them, or stages=2"
            )
        if self.proj_rank_total is None and (self.stages == 2 or self.rank is None):
            self.proj_rank_total = DEFAULT_DIM
        if self.rank is None and self.stages == 2:
            self.rank = AUTO

    def _checked_rank(self) -> tuple[int | None, int | None] | Literal["auto"] | None:
        if self.rank is None or self.rank == AUTO:
            return self.rank
        sides = (self.rank, self.rank) if isinstance(self.rank, int) else tuple(self.rank)
        if len(sides) != 2 or any(k is not None and (not isinstance(k, int) or k < 1) for k in sides):
            raise ValueError(
                f"rank={self.rank!r} must be an int >= 1, (k_in, k_out) with None for a whole side, or 'auto'"
            )
        return sides[0], sides[1]

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")

    @property
    def sketch_dim(self) -> int | None:
        """Numbers of the second stage, None if there is none."""
        return self.proj_rank_total if self.stages == 2 else None

    @property
    def is_fitted(self) -> bool:
        """Whether ranks or bases depend on samples."""
        return self.rank == AUTO or self.basis == "pca"

    def identity(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        free = {"dtype", "on_uncovered", "on_nonfinite", "layers"}
        return {key: value for key, value in asdict(self).items() if key not in free}
