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
from hf_gradtools.ghosttrack.settings.layer_selection import format_layers, parse_layers
from hf_gradtools.ghosttrack.settings.sections import (
    CHOICES,
    NON_NEGATIVE,
    SEED_SAE_OVERRIDES,
    DetectionSection,
    EvaluationSection,
    ExtractionSection,
    ModelSection,
    PathsSection,
    SAESection,
    SAETrainingSection,
    TrackingConfig,
)
from hf_gradtools.ghosttrack.settings.typed_sections import from_mapping, import_yaml, load_yaml, parse_override


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
    "TrackingConfig",
    "format_layers",
    "parse_layers",
    "shipped_configs",
]

CONFIGS = Path(__file__).parent / "configs"


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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    detection: DetectionSection = field(default_factory=DetectionSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        for section, values in dataclasses.asdict(self).items():
            if section != "tracking":  # checks itself
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
        for place, good in (("evaluation.confidence", 0.95), ("sae_training.holdout", 0.02)):
            section, key = place.split(".")
            if not getattr(getattr(self, section), key) < 1:
                raise ValueError(f"{place}={getattr(getattr(self, section), key)} is not below 1. Write {good}.")
        try:
            self.sae.to_config(self.model.base_model)
        except ValueError as error:
            raise ValueError(f"sae.{error}") from error
        _ = self.layers, self.detectors  # a bad selection is an error now

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
        return self._results / "tracking"

    @property
    def detection_folder(self) -> Path:
        """`<results_dir>/detection`."""
        return self._results / "detection"

    @property
    def evaluation_folder(self) -> Path:
        """`<results_dir>/evaluation`."""
        return self._results / "evaluation"

    @property
    def detectors(self) -> list[str]:
        """The feature sets that a detector is fitted on, that of `evaluate`'s case studies first.

        Raises:
            ValueError: there are none, or one twice.
        """
        features = self.detection.features
        named = [features] if isinstance(features, str) else features
        if not named or len(set(named)) < len(named):
            raise ValueError(f"detection.features={features!r} is empty or names one twice. Write latents.")
        return named

    @property
    def datasets(self) -> dict[str, str]:
        """The detection data sets by the name that their results have: a file's stem, or the last part of an id.

        Raises:
            ValueError: there are none, or two of one name.
        """
        given = self.detection.dataset
        sources = [given] if isinstance(given, str) else list(given or ())
        if not sources:
            raise ValueError(
                "detection.dataset=None names no labelled answers. Write the file or folder that "
                "`hf-gradtools ghosttrack questions` makes."
            )
        named = {Path(source.replace(":", "-")).stem: source for source in sources}
        if len(named) < len(sources):
            raise ValueError(f"detection.dataset={sources} has two of one name, {list(named)}. Rename one.")
        return named

    @property
    def _results(self) -> Path:
        return Path(self.paths.results_dir).expanduser()


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
        "tracking": _keys(TrackingConfig),
        "detection": _keys(DetectionSection),
        "evaluation": _keys(EvaluationSection),
    }


def _keys(section: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(section)]


def _check_value(place: str, value: Any) -> None:
    if place in CHOICES and not (set(value) if isinstance(value, list) else {value}) <= set(CHOICES[place]):
        known = ", ".join(choice or "null" for choice in CHOICES[place])
        raise ValueError(f"{place}={value!r} is unknown; need one of {known}.")
    if isinstance(value, int | float) and not isinstance(value, bool) and place != "extraction.layers":
        need = "0 or more" if place in NON_NEGATIVE else "more than 0"
        if not ((value > 0 or (value == 0 and place in NON_NEGATIVE)) and value < float("inf")):
            raise ValueError(f"{place}={value!r} is out of range; need {need}.")
    if value == "" or (isinstance(value, list) and "" in value):
        raise ValueError(f"{place}='' is empty; need a value.")


def _layer_folder(folder: Path, layer: int | None) -> Path:
    return folder if layer is None else folder / f"layers.{layer}"
