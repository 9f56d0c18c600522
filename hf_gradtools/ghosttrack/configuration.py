"""What a GhostTrack run is: a YAML file read strictly into nested dataclasses, and the folders that follow from it."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.layer_selection import format_layers, parse_layers
from hf_gradtools.ghosttrack.typed_sections import from_mapping, import_yaml, load_yaml, parse_override


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


__all__ = [
    "SEED_SAE_OVERRIDES",
    "DetectionSection",
    "EvaluationSection",
    "ExtractionSection",
    "GhostTrackConfig",
    "ModelSection",
    "PathsSection",
    "SAESection",
    "SAETrainingSection",
    "TrackingSection",
    "format_layers",
    "parse_layers",
    "shipped_configs",
]

CONFIGS = Path(__file__).parent / "configs"
SEED_SAE_OVERRIDES = (
    "sae.activation=jumprelu",
    "sae.shared_threshold=true",
    "sae.threshold_init=0.1",
    "sae.sparsity_coefficient=0.01",
)
CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "sae.activation": ("topk", "batchtopk", "jumprelu", "relu", "gated"),
    "sae_training.optimizer": ("adam", "adamw"),
    "tracking.matching": ("hungarian", "greedy", "feature_id", "random", "none"),
    "detection.detector": ("latents", "tracks", "both"),
    "detection.classifier": ("logistic_regression", "random_forest", "gradient_boosting", "ensemble"),
}
NON_NEGATIVE = {
    "sae.threshold_init",
    "sae.sparsity_coefficient",
    "sae_training.warmup_steps",
    "sae_training.seed",
    "tracking.cosine_weight",
    "tracking.activation_weight",
    "tracking.position_weight",
    "tracking.birth_threshold",
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
    """The sparse autoencoder of each layer; `d_hidden` is its number of features."""

    d_model: int
    d_hidden: int
    activation: str = "topk"
    k: int = 32
    threshold_init: float = 0.1
    shared_threshold: bool = False
    sparsity_coefficient: float = 0.0
    normalize_decoder: bool = True


@dataclass
class SAETrainingSection:
    """How the autoencoders learn; `n_tokens` per layer, `batch_size` in tokens."""

    n_tokens: int = 10_000_000
    epochs: int = 20
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    seed: int = 0


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
    dataset_config: str | None = None
    split: str = "train"
    text_column: str = "text"
    batch_size: int = 32
    max_length: int = 512
    layers: str | int | list[int] = "all"


@dataclass
class TrackingSection:
    """How features of one layer are matched to those of the next."""

    top_k: int = 50
    matching: str = "hungarian"
    cosine_weight: float = 0.6
    activation_weight: float = 0.2
    position_weight: float = 0.2
    max_cost: float = 0.5
    birth_threshold: float = 0.5


@dataclass
class DetectionSection:
    """What tells a hallucination: SAE latents, the seed's track features, or both."""

    dataset: str | None = None
    detector: str = "latents"
    classifier: str = "logistic_regression"


@dataclass
class EvaluationSection:
    """How the detector is judged."""

    folds: int = 5
    bootstrap_samples: int = 1000
    confidence: float = 0.95
    ablations: bool = True
    baselines: bool = True
    n_cases: int = 12
    seed: int = 0


@dataclass
class GhostTrackConfig:
    """All settings of a GhostTrack run, checked against each other.

    Args:
        model, sae, sae_training, paths, extraction, tracking, detection, evaluation: one dataclass per section of
            the YAML file; `model`, `sae` and `paths` are needed.

    Raises:
        ValueError: a value is out of range or two do not agree, such as `sae.d_model` and `model.d_model`.
    """

    model: ModelSection
    sae: SAESection
    paths: PathsSection
    sae_training: SAETrainingSection = field(default_factory=SAETrainingSection)
    extraction: ExtractionSection = field(default_factory=ExtractionSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    detection: DetectionSection = field(default_factory=DetectionSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        for section, values in dataclasses.asdict(self).items():
            for key, value in values.items():
                _check_value(f"{section}.{key}", value)
        if self.sae.d_model != self.model.d_model:
            raise ValueError(
                f"sae.d_model={self.sae.d_model} is not model.d_model={self.model.d_model}; an SAE reads the model's "
                f"hidden states. Write sae.d_model: {self.model.d_model}."
            )
        if self.sae.activation in ("topk", "batchtopk") and self.sae.k > self.sae.d_hidden:
            raise ValueError(
                f"sae.k={self.sae.k} is more than sae.d_hidden={self.sae.d_hidden} features. Lower sae.k."
            )
        if self.evaluation.folds < 2:
            raise ValueError(f"evaluation.folds={self.evaluation.folds} leaves nothing to train on; need at least 2.")
        if not self.evaluation.confidence < 1:
            raise ValueError(f"evaluation.confidence={self.evaluation.confidence} is not below 1. Write 0.95.")
        _ = self.layers  # a bad selection is an error now

    @classmethod
    def from_yaml(cls, path_or_name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> GhostTrackConfig:
        """Reads a file, or one of the configurations that come with the package.

        Args:
            path_or_name (`str` or `os.PathLike`): a YAML file, or a name of [`shipped_configs`] such as
                `"gpt2-small"`. A file of that name in the working directory goes first.
            overrides (`Iterable[str]`): `section.key=value`, the value in YAML; a later one wins.

        Returns:
            `GhostTrackConfig`.

        Raises:
            FileNotFoundError: there is neither a file nor a shipped configuration of that name.
            ValueError: a key is unknown or missing, a value has the wrong type or range; it names the file, the key,
                the value and the nearest valid key.
        """
        path = find_config(path_or_name)
        content = load_yaml(path)
        sources: dict[str, str] = {}
        for override in overrides:
            (section, key), value = parse_override(override, _sections())
            if not isinstance(content.setdefault(section, {}), dict):
                raise ValueError(f"{path}: {section}={content[section]!r} is not a section; need keys below it.")
            content[section][key] = value
            sources[f"{section}.{key}"] = f"override {override!r}"
        return from_mapping(cls, content, str(path), sources)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The configuration as YAML with every key; written to `path`, atomically, if there is one."""
        text = str(import_yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(text.encode())
        return text

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section, then key, in the order of the shipped files."""
        order = ("model", "sae", "sae_training", "paths", "extraction", "tracking", "detection", "evaluation")
        values = dataclasses.asdict(self)
        return {section: values[section] for section in order}

    def check_model(self, hf_config: PreTrainedConfig) -> None:
        """Compares `model` with the configuration of the model itself.

        Args:
            hf_config (`PreTrainedConfig`): of any causal LM.

        Raises:
            ValueError: the width or the number of layers is another; it says what the model has.
        """
        text_config = hf_config.get_text_config()
        found = {"d_model": text_config.hidden_size, "n_layers": text_config.num_hidden_layers}
        wrong = {key: value for key, value in found.items() if getattr(self.model, key) != value}
        if wrong:
            said = ", ".join(f"model.{key}={getattr(self.model, key)}" for key in wrong)
            need = ", ".join(f"{key}: {value}" for key, value in wrong.items())
            sae = " and the same d_model below sae" if "d_model" in wrong else ""
            raise ValueError(
                f"{said} is not what {self.model.base_model!r} ({text_config.model_type}) has. Write {need} below "
                f"model{sae}."
            )

    @property
    def layers(self) -> list[int]:
        """The layers of `extraction.layers`, ascending."""
        return parse_layers(self.extraction.layers, self.model.n_layers, "extraction.layers")

    @property
    def hookpoints(self) -> list[str]:
        """The same layers as hookpoints: `layers.0`, ..."""
        return [f"layers.{layer}" for layer in self.layers]

    def hidden_states_folder(self, layer: int | None = None) -> Path:
        """`<cache_dir>/hidden_states`, and in it a folder for each layer."""
        return _layer_folder(Path(self.paths.cache_dir).expanduser() / "hidden_states", layer)

    def checkpoints_folder(self, layer: int | None = None) -> Path:
        """`<models_dir>`, and in it a folder for each layer's SAE."""
        return _layer_folder(Path(self.paths.models_dir).expanduser(), layer)

    @property
    def tracking_folder(self) -> Path:
        """`<results_dir>/tracking`."""
        return Path(self.paths.results_dir).expanduser() / "tracking"

    @property
    def detection_folder(self) -> Path:
        """`<results_dir>/detection`."""
        return Path(self.paths.results_dir).expanduser() / "detection"

    @property
    def evaluation_folder(self) -> Path:
        """`<results_dir>/evaluation`."""
        return Path(self.paths.results_dir).expanduser() / "evaluation"


def shipped_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_config(path_or_name: str | os.PathLike[str]) -> Path:
    """The file itself, or the shipped one of that name."""
    path = Path(path_or_name)
    shipped = CONFIGS / f"{str(path_or_name).removesuffix('.yaml')}.yaml"
    if path.is_file():
        return path
    if path.name == str(path_or_name) and shipped.is_file():
        return shipped
    close = difflib.get_close_matches(path.stem, shipped_configs(), 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise FileNotFoundError(
        f"config={str(path_or_name)!r} is no file and no shipped configuration; those are "
        f"{', '.join(shipped_configs())}.{hint}"
    )


def _sections() -> Mapping[str, Sequence[str]]:
    return {
        "model": _keys(ModelSection),
        "sae": _keys(SAESection),
        "sae_training": _keys(SAETrainingSection),
        "paths": _keys(PathsSection),
        "extraction": _keys(ExtractionSection),
        "tracking": _keys(TrackingSection),
        "detection": _keys(DetectionSection),
        "evaluation": _keys(EvaluationSection),
    }


def _keys(section: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(section)]


def _check_value(place: str, value: Any) -> None:
    if place in CHOICES and value not in CHOICES[place]:
        raise ValueError(f"{place}={value!r} is unknown; need one of {', '.join(CHOICES[place])}.")
    if isinstance(value, int | float) and not isinstance(value, bool) and place != "extraction.layers":
        need = "0 or more" if place in NON_NEGATIVE else "more than 0"
        if not ((value > 0 or (value == 0 and place in NON_NEGATIVE)) and value < float("inf")):
            raise ValueError(f"{place}={value!r} is out of range; need {need}.")
    if value == "":
        raise ValueError(f"{place}='' is empty; need a value.")


def _layer_folder(folder: Path, layer: int | None) -> Path:
    return folder if layer is None else folder / f"layers.{layer}"
