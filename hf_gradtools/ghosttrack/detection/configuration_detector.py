"""Configuration of a hallucination detector: which model and autoencoders it reads, and how it decides."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_gradtools.ghosttrack.choices import FEATURES, SCOPES
from hf_gradtools.ghosttrack.classifiers.recipes import make_classifier
from hf_gradtools.ghosttrack.tracking.tracking import TrackingConfig


LABELS = {0: "SUPPORTED", 1: "HALLUCINATED"}
TEMPLATE = "Question: {question}\nAnswer: {answer}"


@strict
class DetectorConfig(PreTrainedConfig):
    """What a [`HallucinationDetector`] is made of.

    Args:
        model_name (`str`): Hub id or folder of the causal LM that reads the texts.
        model_revision (`str`, *optional*): its commit, branch or tag.
        hookpoints (`list[str]`): where the autoencoders read it, in the order of the model.
        features (`str`, defaults to `"latents"`): what the classifier sees. `"latents"`: each latent's maximum over
            the tokens that count; `"tracks_seed"`, `"tracks_enlarged"`: GhostTrack's features of tracks, or the
            larger set; `"latents+tracks"`: latents and the larger set.
        classifier (`str`, defaults to `"logistic_regression"`): or `"random_forest"`, `"gradient_boosting"`,
            `"ensemble"`.
        classifier_options (`dict`): of [`make_classifier`], such as `{"select": 512}`.
        tracking (`dict`): fields of [`TrackingConfig`]; tracks explain a verdict even where they are no features.
        threshold (`float`, *optional*): probability from which on a text is called hallucinated; `fit` sets it.
        prompt_template (`str`): what a question and an answer are put into; ends with `"{answer}"`.
        scope (`str`, defaults to `"answer"`): which tokens count, those of the `"answer"` or of the whole `"text"`.
        max_tokens (`int`, defaults to 512): of a text; of a longer one the last so many are read.
        skip_first (`int`, defaults to 1): first positions that never count.
        sae_repo (`str`, *optional*): Hub id of the autoencoders; default, they are saved with the detector.
        sae_revision (`str`, *optional*): its commit, branch or tag.
        metrics (`dict`): what was measured, as [`HallucinationDetector.evaluate`] leaves it.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    model_type = "hallucination_detector"

    model_name: str | None = None
    model_revision: str | None = None
    hookpoints: list[str] | tuple[str, ...] = ()
    features: str = "latents"
    classifier: str = "logistic_regression"
    classifier_options: dict | None = None
    tracking: dict | None = None
    threshold: float | int | None = None
    prompt_template: str = TEMPLATE
    scope: str = "answer"
    max_tokens: int = 512
    skip_first: int = 1
    sae_repo: str | None = None
    sae_revision: str | None = None
    metrics: dict | None = None

    def __post_init__(self, **kwargs: Any):
        self.hookpoints = list(self.hookpoints)
        self.classifier_options = dict(self.classifier_options or {})
        self.tracking = dict(self.tracking or {})
        self.metrics = dict(self.metrics or {})
        if self.id2label is None:
            self.id2label = dict(LABELS)
            self.label2id = {label: number for number, label in LABELS.items()}
        super().__post_init__(**kwargs)
        self.validate_values()

    def validate_values(self) -> None:
        """ValueError if a value is unknown or out of range."""
        for name, choices in (("features", FEATURES), ("scope", SCOPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(choices)}.")
        if self.skip_first < 0 or self.max_tokens <= self.skip_first:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves no token after skip_first={self.skip_first}, or one of them is "
                "negative. Pass max_tokens=512, skip_first=1."
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is no probability. Pass a number from 0 to 1.")
        template = self.prompt_template
        if template.count("{question}") != 1 or template.count("{answer}") != 1 or not template.endswith("{answer}"):
            raise ValueError(
                f"prompt_template={template!r} must name {{question}} once and end with its one {{answer}}. "
                f"Pass for example {TEMPLATE!r}."
            )
        if set(self.id2label) != {0, 1}:
            raise ValueError(f"id2label={self.id2label} must name the labels 0 and 1. Pass for example {LABELS}.")
        if len(set(self.hookpoints)) != len(self.hookpoints):
            raise ValueError(f"hookpoints={self.hookpoints} names one twice. Pass each once.")
        make_classifier(self.classifier, **self.classifier_options)
        if self.tracking_config.similarity == "coactivation":
            raise ValueError(
                "tracking={'similarity': 'coactivation'} is for analyses: its statistics are not saved with a "
                "detector. Pass 'decoder' or 'transported'."
            )

    @property
    def tracking_config(self) -> TrackingConfig:
        """How features are tracked.

        Raises:
            ValueError: `tracking` has a field that [`TrackingConfig`] has not, or a value out of its range.
        """
        known = [item.name for item in fields(TrackingConfig)]
        if unknown := sorted(set(self.tracking) - set(known)):
            raise ValueError(f"tracking has no field {unknown[0]!r}; it has {', '.join(known)}. Leave it out.")
        return TrackingConfig(**self.tracking)


__all__ = ["DetectorConfig"]
