"""The sections of a GhostTrack configuration, and what each becomes in the parts of the library that it steers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_gradtools.ghosttrack.choices import FEATURES, SCOPES
from hf_gradtools.ghosttrack.classifiers.recipes import CLASSIFIERS
from hf_gradtools.ghosttrack.tracking.tracking import TrackingConfig


if TYPE_CHECKING:
    from hf_gradtools.sae.configuration_sae import SAEConfig
    from hf_gradtools.sae.training_config import SAETrainingConfig


__all__ = [
    "CHOICES",
    "NON_NEGATIVE",
    "SEED_SAE_OVERRIDES",
    "DetectionSection",
    "EvaluationSection",
    "ExtractionSection",
    "ModelSection",
    "PathsSection",
    "SAESection",
    "SAETrainingSection",
    "TrackingConfig",
]

SEED_SAE_OVERRIDES = (
    "sae.activation=jumprelu",
    "sae.shared_threshold=true",
    "sae.threshold_init=0.1",
    "sae.sparsity_penalty=mean_l1",
    "sae.sparsity_coefficient=0.01",
    "sae.auxk_coefficient=0",
    "sae_training.normalize_input=false",
    "sae_training.lr_scheduler_type=constant",
    "sae_training.warmup_fraction=0",
)
"""The published autoencoder: JumpReLU with one threshold, squared error and 0.01 times the mean absolute latent."""

MEAN_L1 = "mean_l1"
CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "sae.activation": ("topk", "batchtopk", "jumprelu", "relu", "gated"),
    "sae.sparsity_penalty": (None, "l1", MEAN_L1, "l0", "none"),
    "sae_training.lr_scheduler_type": ("linear", "constant"),
    "extraction.dtype": ("bfloat16", "float16", "float32"),
    "detection.features": FEATURES,
    "detection.scope": SCOPES,
    "detection.classifier": (None, *CLASSIFIERS),
}
NON_NEGATIVE = {
    "sae.threshold_init",
    "sae.sparsity_coefficient",
    "sae.auxk_coefficient",
    "sae_training.warmup_fraction",
    "sae_training.decay_start",
    "sae_training.seed",
    "extraction.skip_positions",
    "detection.skip_first",
    "evaluation.n_cases",
    "evaluation.seed",
}


@dataclass
class ModelSection:
    """The language model, and what its config.json must say."""

    base_model: str
    d_model: int
    n_layers: int
    revision: str | None = None
    dtype: str = "auto"


@dataclass
class SAESection:
    """The sparse autoencoder of each layer; `d_hidden` is its number of features, `d_model` the model's width."""

    d_model: int
    d_hidden: int
    activation: str = "topk"
    k: int = 32
    threshold_init: float = 0.1
    shared_threshold: bool = False
    sparsity_penalty: str | None = None
    sparsity_coefficient: float = 1e-3
    auxk_coefficient: float = 1 / 32

    def to_config(self, model_name: str) -> SAEConfig:
        """What an autoencoder is made of. `"mean_l1"` is a sum over the features with its weight over their number."""
        from hf_gradtools.sae.configuration_sae import SAEConfig

        mean = self.sparsity_penalty == MEAN_L1
        return SAEConfig(
            d_in=self.d_model,
            d_sae=self.d_hidden,
            activation=self.activation,
            k=self.k,
            model_name=model_name,
            sparsity_penalty="l1" if mean else self.sparsity_penalty,
            sparsity_coefficient=self.sparsity_coefficient / (self.d_hidden if mean else 1),
            threshold=self.threshold_init,
            shared_threshold=self.shared_threshold,
            auxk_coefficient=self.auxk_coefficient,
        )


@dataclass
class SAETrainingSection:
    """How the autoencoders learn, by Adam; `n_tokens` of each layer, `batch_size` in tokens.

    `holdout` is the share of the sequences, the last ones, that they are measured on and do not learn from.
    """

    n_tokens: int = 10_000_000
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-4
    max_grad_norm: float | None = 1.0
    lr_scheduler_type: str = "linear"
    warmup_fraction: float = 0.05
    decay_start: float = 0.1
    normalize_input: bool = True
    bf16: bool = False
    buffer_tokens: int = 131_072
    dead_after_tokens: int = 1_000_000
    save_steps: int = 500
    holdout: float = 0.02
    seed: int = 0

    def to_config(self, output_dir: str, batch_size: int, **more: Any) -> SAETrainingConfig:
        """What an [`SAETrainer`] is given; `batch_size` may be less than asked for, where memory ran out."""
        from hf_gradtools.sae.training_config import SAETrainingConfig

        return SAETrainingConfig(
            output_dir=output_dir,
            batch_tokens=batch_size,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            max_grad_norm=self.max_grad_norm,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_fraction=self.warmup_fraction,
            decay_start=self.decay_start,
            normalize_input=self.normalize_input,
            bf16=self.bf16,
            buffer_tokens=self.buffer_tokens,
            dead_after_tokens=self.dead_after_tokens,
            save_steps=self.save_steps,
            seed=self.seed,
            **more,
        )


@dataclass
class PathsSection:
    """Folders of one model; relative ones start at the working directory."""

    cache_dir: str
    models_dir: str
    results_dir: str


@dataclass
class ExtractionSection:
    """Which hidden states are kept, of which texts; `batch_size` in sequences, `max_length` in tokens."""

    dataset: str | None = None
    split: str | None = None
    text_column: str | None = None
    batch_size: int = 32
    max_length: int = 512
    skip_positions: int = 1
    dtype: str = "bfloat16"
    layers: str | int | list[int] = "all"


@dataclass
class DetectionSection:
    """What tells a hallucination, and the labelled answers that it learns from; `batch_size` in texts.

    `scope` is which tokens count, those of the answers or of whole texts; of texts longer than `max_tokens` the last
    ones are read. `features` and the others are those of a `DetectorConfig`.
    """

    dataset: str | list[str] | None = None
    split: str | None = None
    features: str | list[str] = "latents"
    classifier: str | None = None
    scope: str = "answer"
    batch_size: int = 32
    max_tokens: int = 512
    skip_first: int = 1


@dataclass
class EvaluationSection:
    """How detectors are judged."""

    folds: int = 5
    inner_folds: int = 3
    bootstrap_samples: int = 2000
    confidence: float = 0.95
    ablations: bool = True
    baselines: bool = True
    n_cases: int = 12
    seed: int = 0
