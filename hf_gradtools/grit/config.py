"""`GritConfig`: LoRA's options, and what GRIT does with the rank-space Fisher information."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, field
from typing import Any

from peft import LoraConfig, PeftType

from hf_gradtools.grit.register import add_peft_type


PRECONDITIONERS = ("rank_soap", "kfac", "grit", None)
REPROJECTIONS = ("balanced", "two_sided", "one_sided", None)
RANK_CHANGES = ("auto", "physical", "masked", "none")
DEFAULT_LEAST_RANK = 4
RANK_ALLOCATIONS = ("global", "layer")
STATISTICS = ("ema", "mean")
# These rewrite the base weights at the rank they are loaded with, so an adapter cut to another rank would not reload.
BASE_CHANGING_INITS = ("pissa", "corda", "olora", "lora_ga", "loftq", "mica")

# The seed's guidance: "early training" and "longer runs (1-3 epochs)"; its defaults where it gives none.
PRESETS: dict[str, dict[str, Any]] = {
    "short": {
        "kfac_min_samples": 160,
        "kfac_damping": 0.005,
        "kfac_update_freq": 50,
        "reprojection_freq": 50,
        "ng_warmup_steps": 100,
        "reprojection_warmup_steps": 150,
        "rank_adaptation_start_step": 150,
        "regularizer_warmup_steps": 150,
    },
    "long": {
        "kfac_min_samples": 192,
        "kfac_update_freq": 150,
        "reprojection_freq": 300,
        "reprojection_warmup_steps": 500,
        "rank_adaptation_start_step": 500,
    },
    "seed": {
        "preconditioner": "grit",
        "grafting": False,
        "statistics": "mean",
        "grit_cov_update_freq": 15,
        "kfac_update_freq": 50,
        "reprojection": "two_sided",
        "rank_change": "none",
        "reprojection_freq": 50,
        "reprojection_warmup_steps": 0,
        "rank_adaptation_threshold": 0.99,
        "lambda_kfac": 1e-5,
        "lambda_reproj": 1e-4,
        "adaptive_schedule": True,
    },
}


@dataclass
class GritConfig(LoraConfig):
    """A LoRA adapter steered by the Fisher information of its rank space (GRIT, arXiv 2601.00231).

    Everything of [`~peft.LoraConfig`] applies. Steps are optimizer steps; `Σ_a = E[a aᵀ]` and `Σ_g = E[b bᵀ]` are the
    second moments of the rank space's activations `a = A x` and of the gradients `b = s Bᵀ g` arriving there.

    Args:
        preconditioner (`str`, *optional*, defaults to `"rank_soap"`):
            `"rank_soap"`: the optimizer works in the eigenbases of Σ_g (for A) and Σ_a (for B), as SOAP does
            (arXiv 2409.11321), in rank space alone; `"kfac"`: `∇A ← Σ_g⁻¹ ∇A`, `∇B ← ∇B Σ_a⁻¹`, the natural gradient
            by K-FAC; `"grit"`: `∇A ← Σ_a⁻¹ ∇A`, `∇B ← ∇B Σ_g⁻¹`, the paper's pairing, for reproduction; `None`: plain.
        kfac_damping (`float`, defaults to 1e-3):
            Added to the factors before they are inverted, relative to their mean eigenvalue.
        kfac_exponent (`float`, defaults to 1.0):
            Power of the inverse for `"kfac"` and `"grit"`; 0.5 is milder.
        grafting (`bool`, defaults to `True`):
            Keep each matrix's gradient norm under `"kfac"` and `"grit"`, so that clipping still bounds the step.
        kfac_min_samples (`int`, defaults to 64):
            Tokens that a module's factors need before they are used.
        kfac_update_freq (`int`, defaults to 10):
            Steps between inversions, or changes of the eigenbasis.
        kfac_inversion_device (`str`, *optional*):
            Where factors are inverted; default where they are.
        ng_warmup_steps (`int`, defaults to 0):
            Steps before gradients are preconditioned.
        grit_cov_update_freq (`int`, defaults to 5):
            Statistics are taken in every so many steps, from all micro-batches of that step.
        statistics (`str`, defaults to `"ema"`):
            `"ema"` forgets with `ema_decay` at each update, bias-corrected; `"mean"` averages over the whole run.
        ema_decay (`float`, defaults to 0.95):
            Of `statistics="ema"`.
        reprojection (`str`, *optional*, defaults to `"balanced"`):
            How an adapter is cut: `"balanced"` loses least under the Fisher metric, `"two_sided"` and `"one_sided"`
            are the paper's; `None`: never.
        reprojection_freq (`int`, defaults to 50):
            Steps between cuts.
        reprojection_k (`int`, defaults to 8):
            Rank to cut to without `enable_rank_adaptation`.
        reprojection_warmup_steps (`float`, defaults to 0.75):
            Steps before the first cut; below 1, their share of the whole training. What is cut is gone, and a young
            adapter's spectrum says little of what it will need.
        use_two_sided_reprojection (`bool`, *optional*):
            The paper's switch: `True` is `reprojection="two_sided"`, `False` is `"one_sided"`.
        enable_rank_adaptation (`bool`, defaults to `True`):
            Cut each module to the least rank that holds `rank_adaptation_threshold` of its spectrum.
        rank_adaptation_threshold (`float`, defaults to 0.97):
            τ, in (0, 1]: the share that all cuts together keep.
        rank_allocation (`str`, defaults to `"global"`):
            Whose spectrum the threshold is of: `"global"` of all layers together, spending parameters where they hold
            most; `"layer"` of each layer for itself, as in the paper. Only the spectra
            of `reprojection="balanced"` compare between layers; the others go by layer.
        min_lora_rank (`int`, *optional*):
            No module is cut below it; default 4, or `r` if that is less.
        rank_adaptation_start_step (`int`, defaults to 0):
            Steps before ranks adapt; cuts before it go to `reprojection_k`.
        rank_change (`str`, defaults to `"auto"`):
            `"physical"`: A and B become smaller tensors; `"masked"`: the coordinates cut away become zeros and stay
            so, and tensors shrink when training ends; `"none"`: only projected, the next step may fill them again, as
            in the paper's code; `"auto"`: physical in one process, masked in several.
        adaptive_schedule (`bool`, defaults to `False`):
            Over the last 20 losses: frequencies × 1.5 if the second half improved by more than 1 %, else × 0.75; and
            damping `kfac_damping + std(loss)`, at most 1e-2 or `kfac_damping`. The model's output must have the loss.
        lambda_kfac (`float`, defaults to 0):
            Weight of the curvature energy `tr(B Σ_a Bᵀ) + tr(Aᵀ Σ_g A)`, its gradient added to the loss's.
        lambda_reproj (`float`, defaults to 0):
            Weight of the squared distance of A and B from the subspaces that a cut would keep.
        regularizer_warmup_steps (`int`, defaults to 0):
            Steps over which both weights rise from 0.
        initial_rank_pattern (`dict`, *optional*):
            Written by training: the `rank_pattern` that the adapter was created with.
        lora_rank (`int`, *optional*):
            The paper's name of `r`.

    Raises:
        ValueError: a value is out of range, or options exclude each other.
    """

    preconditioner: str | None = field(default="rank_soap")
    kfac_damping: float = field(default=1e-3)
    kfac_exponent: float = field(default=1.0)
    grafting: bool = field(default=True)
    kfac_min_samples: int = field(default=64)
    kfac_update_freq: int = field(default=10)
    kfac_inversion_device: str | None = field(default=None)
    ng_warmup_steps: int = field(default=0)
    grit_cov_update_freq: int = field(default=5)
    statistics: str = field(default="ema")
    ema_decay: float = field(default=0.95)
    reprojection: str | None = field(default="balanced")
    reprojection_freq: int = field(default=50)
    reprojection_k: int = field(default=8)
    reprojection_warmup_steps: float = field(default=0.75)
    enable_rank_adaptation: bool = field(default=True)
    rank_adaptation_threshold: float = field(default=0.97)
    rank_allocation: str = field(default="global")
    min_lora_rank: int | None = field(default=None)
    rank_adaptation_start_step: int = field(default=0)
    rank_change: str = field(default="auto")
    adaptive_schedule: bool = field(default=False)
    lambda_kfac: float = field(default=0.0)
    lambda_reproj: float = field(default=0.0)
    regularizer_warmup_steps: int = field(default=0)
    initial_rank_pattern: dict[str, int] | None = field(default=None)
    use_two_sided_reprojection: InitVar[bool | None] = None
    lora_rank: InitVar[int | None] = None

    def __post_init__(self, use_two_sided_reprojection: bool | None = None, lora_rank: int | None = None) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(PeftType, "GRIT")
        if lora_rank is not None:
            self.r = lora_rank
        if use_two_sided_reprojection is not None:
            self.reprojection = "two_sided" if use_two_sided_reprojection else "one_sided"
        _check(self)

    @classmethod
    def preset(cls, name: str, **options: Any) -> GritConfig:
        """Options for a setting of the paper; `options` go on top.

        Args:
            name: "short" for a few hundred steps (the paper's guidance for early training), "long" for one to three
                epochs, "seed" for what the paper's code does by default.
            **options: any field of the config.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown. Pass one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **options})

    @property
    def least_rank(self) -> int:
        """What `min_lora_rank` comes to."""
        return min(DEFAULT_LEAST_RANK, self.r) if self.min_lora_rank is None else self.min_lora_rank

    @property
    def is_passive(self) -> bool:
        """Whether every mechanism is off, so that training is LoRA's."""
        return not (self.preconditioner or self.reprojection or self.lambda_kfac or self.lambda_reproj)


def _check(config: GritConfig) -> None:
    _check_choices(config)
    _check_ranges(config)
    _check_ranks(config)


def _check_choices(config: GritConfig) -> None:
    choices = {
        "preconditioner": PRECONDITIONERS,
        "reprojection": REPROJECTIONS,
        "rank_change": RANK_CHANGES,
        "rank_allocation": RANK_ALLOCATIONS,
        "statistics": STATISTICS,
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is unknown. Pass one of {', '.join(map(repr, known))}."
            )


LEAST_STEPS = {
    "kfac_min_samples": 1,
    "kfac_update_freq": 1,
    "grit_cov_update_freq": 1,
    "reprojection_freq": 1,
    "reprojection_k": 1,
    "min_lora_rank": 1,
    "ng_warmup_steps": 0,
    "rank_adaptation_start_step": 0,
    "regularizer_warmup_steps": 0,
}


def _check_ranges(config: GritConfig) -> None:
    for name, least in LEAST_STEPS.items():
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or value != int(value) or value < least):
            raise ValueError(f"{name}={value} must be a whole number of at least {least}.")
    for name in ("lambda_kfac", "lambda_reproj", "reprojection_warmup_steps"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 0.")
    for name in ("kfac_damping", "kfac_exponent"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive.")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay={config.ema_decay} must be in [0, 1); 0.95 remembers about 20 updates.")
    if not 0 < config.rank_adaptation_threshold <= 1:
        raise ValueError(
            f"rank_adaptation_threshold={config.rank_adaptation_threshold} must be in (0, 1]: the share of the "
            "spectrum that a cut keeps, such as 0.99."
        )


def _check_ranks(config: GritConfig) -> None:
    if config.lambda_reproj and config.reprojection is None:
        raise ValueError(
            f"lambda_reproj={config.lambda_reproj} needs a reprojection, such as reprojection='balanced'."
        )
    if config.r < 1:
        raise ValueError(f"r={config.r} must be at least 1, such as 16.")
    if config.reprojection is None:
        return
    if config.least_rank > config.r and config.enable_rank_adaptation:
        raise ValueError(
            f"min_lora_rank={config.min_lora_rank} is above r={config.r}, so no module could be cut. Lower it, "
            "raise r, or set enable_rank_adaptation=False."
        )
    warmup = config.reprojection_warmup_steps
    if warmup >= 1 and warmup != int(warmup):
        raise ValueError(
            f"reprojection_warmup_steps={warmup} is neither a share of training (below 1) nor whole steps."
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the base weights at the rank it is loaded with, "
            "so an adapter whose rank has changed could not be loaded again. Set reprojection=None."
        )
