"""Options of the dot-product callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .scoring import METHODS, Method


SCALES = ("contribution", "sample_mean")


@dataclass
class GhostDotProdConfig:
    """What :class:`~hf_gradtools.GhostDotProdCallback` computes and where it writes.

    Args:
        output_dir: folder of the rows; an unfinished run of the same settings in it is continued.
        val_batch_size: validation samples whose mean loss gives the gradient of a step. A larger validation set is
            gone through in batches of this size, in an order shuffled by `seed`; None takes all of it in every step.
        val_micro_batch_size: validation samples in one forward; default as many as `val_batch_size`, at most 16.
        every_steps: score every so many optimizer steps (the others cost nothing and get no rows).
        layers: what to score: None for every trainable parameter, "all-linear", or regular expressions of module
            names.
        method: how each layer is scored, see the guide; "auto" is fastest, "contraction" and "gram" leave training
            bit-identical.
        scale: "contribution", the sample's share in the gradient of the step (they add up to ⟨gradient, G⟩), or
            "sample_mean", as if the step had been on the sample alone with its mean-token loss.
        per_layer: also a column `layer_dot_products`, in the order of the manifest's `layers`.
        per_token: also a column `token_dot_products`.
        pairwise: also a column `pairwise_dot_products` with every sample of the step's validation batch, whose ids
            are in `val_sample_ids`. Holds one gradient of the scored parameters per validation sample.
        grad_norms: also the columns `grad_norm` and `cosine`.
        sample_losses: also a column `sample_loss`, the mean-token loss of each sample.
        optimizer_aware: score against what the optimizer makes of the gradient. True uses the second moment before
            the step (free); "exact" differentiates the step itself (keeps the step's activations).
        second_order: values include the curvature term of In-Run Data Shapley, from one Hessian-vector product per
            validation set (keeps the step's activations).
        on_uncovered: "error" or "warn" when part of the gradient is not in the values.
        on_nonfinite: "error" to stop at a NaN or infinite value, "skip" to leave those rows out.
        sample_id_column: column of the training rows that identifies them; where absent, their index does.
        overwrite_output_dir: discard rows of a finished run in `output_dir`.
        rows_per_shard: rows per file.
        seed: order of the validation batches.

    Raises:
        ValueError: an option is out of range, or two exclude each other.
    """

    output_dir: str = "ghost"
    val_batch_size: int | None = 16
    val_micro_batch_size: int | None = None
    every_steps: int = 1
    layers: str | Sequence[str] | None = None
    method: Method = "auto"
    scale: Literal["contribution", "sample_mean"] = "contribution"
    per_layer: bool = False
    per_token: bool = False
    pairwise: bool = False
    grad_norms: bool = False
    sample_losses: bool = False
    optimizer_aware: bool | Literal["exact"] = False
    second_order: bool = False
    on_uncovered: Literal["error", "warn"] = "error"
    on_nonfinite: Literal["error", "skip"] = "error"
    sample_id_column: str = "sample_id"
    overwrite_output_dir: bool = False
    rows_per_shard: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choice("method", METHODS)
        self._check_choice("scale", SCALES)
        self._check_choice("on_uncovered", ("error", "warn"))
        self._check_choice("on_nonfinite", ("error", "skip"))
        self._check_choice("optimizer_aware", (False, True, "exact"))
        for name in ("val_batch_size", "val_micro_batch_size", "every_steps", "rows_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.method == "gram" and (self.optimizer_aware or self.pairwise or self.per_token):
            raise ValueError(
                "method='gram' scores against unscaled gradients of whole validation batches; with optimizer_aware, "
                "pairwise or per_token use method='contraction' or 'auto'"
            )
        if self.optimizer_aware == "exact" and (self.second_order or self.per_token or self.pairwise):
            raise ValueError(
                "optimizer_aware='exact' scores after the step's gradient is known and does not combine with "
                "second_order, per_token or pairwise; use optimizer_aware=True"
            )
        if self.pairwise and self.second_order:
            raise ValueError("pairwise=True and second_order=True do not combine; run them as two callbacks")

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")

    def identity(self) -> dict[str, Any]:
        """The options that the stored numbers depend on."""
        free = {"output_dir", "overwrite_output_dir", "rows_per_shard", "on_uncovered", "on_nonfinite"}
        return {key: value for key, value in asdict(self).items() if key not in free}

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]
