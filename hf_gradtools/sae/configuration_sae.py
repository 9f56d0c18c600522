"""What a sparse autoencoder is: its size, its activation, and the terms of its loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


__all__ = ["ACTIVATIONS", "SAEConfig"]

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
WITH_K = ("topk", "batchtopk")
DEFAULT_PENALTY = {"relu": "l1", "gated": "l1", "jumprelu": "l0", "topk": "none", "batchtopk": "none"}


@dataclass
class SAEConfig:
    """A sparse autoencoder.

    Args:
        d_in (`int`): width of the hidden states.
        d_sae (`int`): number of features.
        activation (`str`, defaults to `"topk"`): `"topk"` keeps the k largest features of each token; `"batchtopk"`
            the k·N largest of a batch in training, and those above a threshold afterwards; `"jumprelu"` those above a
            learned threshold; `"relu"` all positive ones; `"gated"` those whose gate is open.
        k (`int`, defaults to 32): active features of a token, for `"topk"` and `"batchtopk"`.
        hookpoint (`str`, *optional*): where the hidden states come from, such as `"layers.5"`.
        model_name (`str`, *optional*): Hub id of the model that they come from.
        apply_b_dec_to_input (`bool`, defaults to `True`): whether `b_dec` is subtracted before encoding.
        matryoshka_widths (`tuple[int, ...]`): numbers of first features that each must reconstruct alone; the last is
            `d_sae`. Empty: all features at once.
        sparsity_penalty (`str`, *optional*): `"l1"` (sum of a token's latents), `"l0"` (their number; for
            `"jumprelu"`) or `"none"`. By default what the activation needs.
        sparsity_coefficient (`float`, defaults to 1e-3): weight of that penalty beside the mean squared error.
        threshold (`float`, defaults to 0.1): of `"jumprelu"` at the beginning.
        shared_threshold (`bool`, defaults to `False`): whether all features share one threshold.
        bandwidth (`float`, defaults to 0.05): width of the kernel in the thresholds' gradient estimate.
        auxk (`int`, *optional*): dead features that model what the living ones leave over; default `d_in // 2`.
        auxk_coefficient (`float`, defaults to 1/32): weight of that loss; 0 turns it off.
        metadata (`dict[str, Any]`): JSON values worth keeping with the weights: training figures, data, seeds.

    Raises:
        ValueError: a value is impossible.
    """

    d_in: int
    d_sae: int
    activation: str = "topk"
    k: int = 32
    hookpoint: str | None = None
    model_name: str | None = None
    apply_b_dec_to_input: bool = True
    matryoshka_widths: tuple[int, ...] = ()
    sparsity_penalty: str | None = None
    sparsity_coefficient: float = 1e-3
    threshold: float = 0.1
    shared_threshold: bool = False
    bandwidth: float = 0.05
    auxk: int | None = None
    auxk_coefficient: float = 1 / 32
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.matryoshka_widths = tuple(self.matryoshka_widths)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is unknown. Pass one of {', '.join(ACTIVATIONS)}.")
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.activation in WITH_K and not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}.")
        if self.sparsity_penalty is None:
            self.sparsity_penalty = DEFAULT_PENALTY[self.activation]
        if self.sparsity_penalty not in ("none", "l1", "l0"):
            raise ValueError(f"sparsity_penalty={self.sparsity_penalty!r} is unknown. Pass none, l1 or l0.")
        if self.sparsity_penalty == "l0" and self.activation != "jumprelu":
            raise ValueError(
                f"sparsity_penalty='l0' has a gradient for activation='jumprelu' alone, not for {self.activation!r}. "
                "Pass 'l1' or 'none'."
            )
        if self.bandwidth <= 0 or self.threshold < 0:
            raise ValueError(f"need bandwidth > 0 and threshold >= 0, got {self.bandwidth=}, {self.threshold=}.")
        if self.auxk is not None and self.auxk < 1:
            raise ValueError(f"auxk={self.auxk} must be at least 1. Pass auxk_coefficient=0 to do without.")
        self._check_widths()

    def _check_widths(self) -> None:
        widths = self.matryoshka_widths
        if widths and (list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae):
            raise ValueError(
                f"matryoshka_widths={widths} must rise from at least 1 to d_sae={self.d_sae}. "
                f"Pass for example {(self.d_sae // 4, self.d_sae // 2, self.d_sae)}."
            )
        if widths and self.activation == "gated":
            raise ValueError("matryoshka_widths goes with every activation but 'gated'. Pass activation='batchtopk'.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for [`SAEConfig.from_dict`]."""
        return {**asdict(self), "matryoshka_widths": list(self.matryoshka_widths)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SAEConfig:
        """The configuration that [`SAEConfig.to_dict`] gave.

        Raises:
            ValueError: a field is unknown, missing or impossible.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"SAEConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
        if missing := sorted({"d_in", "d_sae"} - set(values)):
            raise ValueError(f"SAEConfig needs {' and '.join(missing)}, which the values given lack.")
        return cls(**values)
