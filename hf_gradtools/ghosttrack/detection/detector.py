"""A hallucination detector: a causal LM, sparse autoencoders on its layers, and a classifier of what they show."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.ghosttrack.classifiers.classifier_files import save_classifier
from hf_gradtools.ghosttrack.classifiers.frozen import Features, FrozenClassifier
from hf_gradtools.ghosttrack.detection.configuration_detector import DetectorConfig
from hf_gradtools.ghosttrack.detection.detector_files import (
    CONFIG,
    MAPS,
    SAES,
    check_config,
    find_folder,
    load_causal_lm,
    load_parts,
    load_tokenizer,
    save_maps,
)
from hf_gradtools.ghosttrack.detection.detector_outputs import DetectorOutput, as_text, contributions
from hf_gradtools.ghosttrack.evaluation.cross_validation import Method, cross_validate, fit_method
from hf_gradtools.ghosttrack.evaluation.results import CrossValidation
from hf_gradtools.ghosttrack.reading.batching import pad_token_of
from hf_gradtools.ghosttrack.reading.reading import Reading, TokenRow, check_saes, read_rows, read_texts
from hf_gradtools.ghosttrack.tracking.track_features import detection_features
from hf_gradtools.ghosttrack.tracking.tracking import Tracks, track
from hf_gradtools.hub import is_hub_id, push_folder
from hf_gradtools.sae.modeling_sae import SAE


__all__ = ["HallucinationDetector"]

FEATURE_SETS = {"tracks_seed": "seed", "tracks_enlarged": "enlarged", "latents+tracks": "enlarged"}
DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")
FROM_AUTO = ("_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision")
NAME = "detector"  # in tables of metrics
SMALLEST = 1e-12  # probability whose logarithm is taken


class HallucinationDetector(PreTrainedModel):
    """Says how likely a text's answer is hallucinated, and what in the model speaks for it.

    ```python
    detector = HallucinationDetector.from_pretrained("user/detector")
    [verdict] = detector.predict([{"question": "Who wrote Faust?", "answer": "Goethe"}])
    verdict.probability, verdict.features, verdict.plot()
    ```

    Only the classifier, and the autoencoders unless they have a repository, are saved with it: the language model
    stays where it is, named by `config.model_name`.

    Args:
        config ([`DetectorConfig`]): what it reads and how it decides.
        saes (`Mapping[str, SAE]`): by hookpoint, in the order of the model.
        causal_lm (`PreTrainedModel`, *optional*): what reads texts; not needed to work on readings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, likewise.
        classifier ([`FrozenClassifier`], *optional*): what decides; `fit` makes it.
        maps (`list[np.ndarray]`, *optional*): of `tracking={"similarity": "transported"}`, see [`procrustes`].

    Raises:
        ValueError: the parts do not fit together.
    """

    config_class = DetectorConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # if the language model does, which checks it

    def __init__(
        self,
        config: DetectorConfig,
        saes: Mapping[str, SAE] | None = None,
        causal_lm: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        classifier: FrozenClassifier | None = None,
        maps: Sequence[np.ndarray] | None = None,
    ):
        super().__init__(config)
        if not saes:
            raise ValueError("saes is empty; a detector needs an autoencoder at least. Pass saes=load_many(folder).")
        config.hookpoints = config.hookpoints or list(saes)
        if list(saes) != config.hookpoints:
            raise ValueError(
                f"saes={list(saes)} are not those of hookpoints={config.hookpoints}. Pass those, in order."
            )
        for hookpoint, sae in saes.items():
            if sae.config.hookpoint != hookpoint:
                raise ValueError(
                    f"saes[{hookpoint!r}] is an autoencoder of hookpoint={sae.config.hookpoint!r}. Pass it under its "
                    "own name, or set its config.hookpoint."
                )
        if causal_lm is not None:
            check_saes(causal_lm, saes)
        config.validate_values()  # what was set since it was made
        self.tracking = config.tracking_config
        if (self.tracking.similarity == "transported") != (maps is not None):
            raise ValueError("maps belong to tracking={'similarity': 'transported'}. Pass both or neither.")
        self.causal_lm = causal_lm
        self._autoencoders = nn.ModuleList(saes.values())
        self.tokenizer, self.classifier = tokenizer, classifier
        self.maps = None if maps is None else list(maps)
        if device_map := getattr(causal_lm, "hf_device_map", None):  # of accelerate; whoever would move us looks at it
            self.hf_device_map = device_map
        self.eval()

    @property
    def saes(self) -> dict[str, SAE]:
        """The autoencoders by hookpoint."""
        return dict(zip(self.config.hookpoints, self._autoencoders, strict=True))

    # ---- from texts to features

    def read(self, texts: Sequence[Any], answer_starts: Sequence[int] | None = None, **options: Any) -> Reading:
        """[`read_texts`] with this detector's model and settings.

        Args:
            texts (`Sequence`): each a text, a `(prompt, answer)`, a `{"question", "answer"}` or a
                `{"text", "answer_start"}`.
            answer_starts (`Sequence[int]`, *optional*): character at which each text's answer begins, if all are
                plain texts; without, all of a plain text is the answer.
            **options: `batch_size`, `output_dir`, `chunk_texts`, `hidden`, `progress`.
        """
        if self.causal_lm is None or self.tokenizer is None:
            raise ValueError(
                "the detector has no causal_lm or no tokenizer to read texts with. Pass both, or a Reading."
            )
        pairs = [as_text(text, self.config.prompt_template, row) for row, text in enumerate(texts)]
        starts = [start for _, start in pairs] if answer_starts is None else answer_starts
        settings = {"scope": self.config.scope, "max_length": self.config.max_tokens}
        settings |= {"skip_first": self.config.skip_first, "top_k": self.tracking.top_k}
        return read_texts(
            self.causal_lm, self.tokenizer, self.saes, [text for text, _ in pairs], starts, **settings | options
        )

    def track(self, reading: Reading) -> Tracks:
        """The texts' features through the layers."""
        self._check(reading)
        decoders = [sae.W_dec.detach().float().cpu().numpy() for sae in self._autoencoders]
        return track(reading.hypotheses, decoders, self.tracking, maps=self.maps)

    def features(self, reading: Reading, tracks: Tracks | None = None) -> tuple[Features, list[str]]:
        """What the classifier sees of texts, `[T, P]`, and the P names; `tracks`, if at hand, are not made again."""
        self._check(reading)
        parts, names = [], []
        if self.config.features.startswith("latents"):
            for hookpoint, latents in reading.pooled.items():
                parts.append(latents)
                names += [f"{hookpoint}/{feature}" for feature in range(latents.shape[1])]
        if self.config.features in FEATURE_SETS:
            tracks = self.track(reading) if tracks is None else tracks
            values, of_tracks = detection_features(tracks, FEATURE_SETS[self.config.features])
            if not parts:
                return values, of_tracks
            parts.append(values)
            names += of_tracks
        from scipy.sparse import csr_matrix, hstack

        return hstack([csr_matrix(part, dtype=np.float64) for part in parts], format="csr"), names

    def _check(self, reading: Reading) -> None:
        widths = {hookpoint: sae.config.d_sae for hookpoint, sae in self.saes.items()}
        found = {hookpoint: latents.shape[1] for hookpoint, latents in reading.pooled.items()}
        if list(found.items()) != list(widths.items()):
            raise ValueError(
                f"the reading is of {found}; the detector reads {widths} (hookpoint: features). Read again."
            )

    # ---- fitting and measuring

    def fit(
        self, reading: Reading, labels: Any, groups: Any, *, inner_folds: int = 3, seed: int = 0
    ) -> "HallucinationDetector":
        """Fits the classifier and its threshold on texts with known labels; returns the detector.

        Options and threshold are chosen by a cross-validation that keeps groups whole; see [`fit_method`].

        Args:
            reading ([`Reading`]): of T texts.
            labels, groups (`[T]`): 1 = hallucinated, 0 = true; question ids.
            inner_folds (`int`, defaults to 3): of that cross-validation.
            seed (`int`, defaults to 0): of folds and classifier.
        """
        fitted = fit_method(self.method(reading), labels, groups, inner_folds=inner_folds, seed=seed)
        self.classifier, self.config.threshold = fitted.model, min(max(float(fitted.threshold), 0.0), 1.0)
        self.config.metrics = {}  # of another classifier
        return self

    def method(self, reading: Reading, name: str = NAME) -> Method:
        """This detector as one of the methods that [`cross_validate`] compares."""
        return Method(name, self.features(reading)[0], self.config.classifier, self.config.classifier_options)

    def evaluate(
        self, reading: Reading, labels: Any, groups: Any, *, baselines: Sequence[Method] = (), **options: Any
    ) -> CrossValidation:
        """Measures detectors made like this one on texts whose groups they did not see; its card tells the numbers.

        Args:
            reading ([`Reading`]), labels, groups: as for `fit`.
            baselines (`Sequence[Method]`): what it is compared with on the same folds.
            **options: of [`cross_validate`], such as `categories` and `n_folds`.
        """
        result = cross_validate([self.method(reading), *baselines], labels, groups, **options)
        values = result.to_dict()
        differences = {method.name: result.differences(method.name)[NAME] for method in baselines}
        self.config.metrics = {
            "table": values["table"],
            "differences": {name: asdict(value) for name, value in differences.items() if isfinite(value.estimate)},
            "n_texts": len(result.labels),
            "n_groups": len(np.unique(result.groups)),
            "n_folds": int(result.folds.max()) + 1,
            "confidence": result.confidence,
        }
        return result

    # ---- verdicts

    def predict(
        self,
        texts: Reading | Sequence[Any],
        answer_starts: Sequence[int] | None = None,
        *,
        batch_size: int = 16,
        with_tracks: bool = True,
        top_features: int = 10,
        progress: bool = False,
    ) -> list[DetectorOutput]:
        """A verdict on each text.

        Args:
            texts ([`Reading`] or `Sequence`): what was read, or texts as for `read`.
            answer_starts (`Sequence[int]`, *optional*): as for `read`.
            batch_size (`int`, defaults to 16): texts that go through the model at once.
            with_tracks (`bool`, defaults to `True`): track features through the layers, for explanation and plot.
            top_features (`int`, defaults to 10): features told with their contributions.
            progress (`bool`, defaults to `False`): show a bar.

        Raises:
            ValueError: the detector is not fitted, or a text cannot be read.
        """
        classifier, threshold = self._fitted()
        if not isinstance(texts, Reading):
            texts = [texts] if isinstance(texts, (str, Mapping)) else list(texts)
            if not texts:
                return []
            texts = self.read(texts, answer_starts, batch_size=batch_size, progress=progress)
        tracks = self.track(texts) if with_tracks else None
        features, names = self.features(texts, tracks)
        probabilities = classifier.scores(features)
        outputs = []
        for row, reasons in enumerate(contributions(classifier, features, names, top_features)):
            probability = float(probabilities[row])
            label = int(probability >= threshold)
            score = probability if label else 1 - probability
            of_text = None if tracks is None else tracks[row]
            span = (int(texts.spans[row, 0]), int(texts.spans[row, 1]))
            outputs.append(DetectorOutput(self.config.id2label[label], score, probability, reasons, span, of_text))
        return outputs

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, answer_begins: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Log-probabilities of the two labels, without gradient: the classifier is no layer.

        Args:
            input_ids (`Tensor`): `[B, S]`.
            attention_mask (`Tensor`, *optional*): `[B, S]`.
            answer_begins (`Tensor`, *optional*): `[B]`, first token of each answer, padding not counted; default 0.
        """
        classifier, _ = self._fitted()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for row, (ids, kept) in enumerate(zip(input_ids, mask.bool(), strict=True)):
            tokens = ids[kept].tolist()
            begin = 0 if answer_begins is None or self.config.scope == "text" else int(answer_begins[row])
            begin = max(begin, self.config.skip_first)
            if begin >= len(tokens):
                raise ValueError(f"row {row} of input_ids has {len(tokens)} tokens, none from {begin} on that count.")
            rows.append(TokenRow(tokens, begin, len(tokens), 0))
        pad_token = 0 if self.tokenizer is None else pad_token_of(self.tokenizer)
        reading = read_rows(
            self.causal_lm, self.saes, rows, pad_token=pad_token, top_k=self.tracking.top_k, batch_size=len(rows)
        )
        probabilities = torch.from_numpy(classifier.predict_proba(self.features(reading)[0]))
        return SequenceClassifierOutput(logits=probabilities.clamp_min(SMALLEST).log().float().to(input_ids.device))

    def _fitted(self) -> tuple[FrozenClassifier, float]:
        if self.classifier is None or self.config.threshold is None:
            raise ValueError("the detector is not fitted. Call detector.fit(reading, labels, groups) first.")
        return self.classifier, self.config.threshold

    # ---- on disk and on the Hub

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        causal_lm: PreTrainedModel | str | None = None,
        **kwargs: Any,
    ) -> "HallucinationDetector":
        """Loads a detector, its language model included. Nothing but JSON and safetensors is opened.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or a Hub id.
            config ([`DetectorConfig`], *optional*): in place of the saved one.
            causal_lm (`PreTrainedModel` or `str`, *optional*): the language model, or where it is; default
                `config.model_name`.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`; fields of the
                configuration; and what `AutoModelForCausalLM.from_pretrained` takes, such as `dtype` (defaults to
                `"auto"`) and `device_map`.

        Raises:
            ValueError: there is no detector, or a part is missing, damaged, of another kind or a pickle.
        """
        for name in FROM_AUTO:
            kwargs.pop(name, None)
        download = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
        folder = find_folder(pretrained_model_name_or_path, **download)
        if config is None:
            check_config(folder, DetectorConfig.model_type)
            own = {name: kwargs.pop(name) for name in list(kwargs) if name in DetectorConfig.__annotations__}
            config = DetectorConfig.from_pretrained(folder, **own)  # the rest is for the language model
        elif config._attn_implementation is not None:  # what AutoConfig took for itself
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        access = {name: value for name, value in download.items() if name != "revision"}
        saes, classifier, maps = load_parts(folder, config, **access)
        tokenizer = load_tokenizer(folder)
        if not isinstance(causal_lm, PreTrainedModel):
            place = {"revision": config.model_revision} if causal_lm is None else {}
            access.pop("force_download", None)
            causal_lm = load_causal_lm(causal_lm or config.model_name, **place, **access, **kwargs)
        return cls(config, saes, causal_lm, tokenizer, classifier, maps)

    def save_pretrained(self, save_directory: str | os.PathLike[str], repo_id: str | None = None, **_: Any) -> None:
        """Writes the detector with a card of what was measured; its language model is named, not copied.

        Args:
            save_directory (`str` or `os.PathLike`): folder; made if absent.
            repo_id (`str`, *optional*): what the card calls it.

        Raises:
            ValueError: the detector is not fitted, or has no tokenizer or no `config.model_name`.
        """
        from hf_gradtools.ghosttrack.detection.detector_card import write_detector_card
        from hf_gradtools.sae.saving import save_many

        classifier, _threshold = self._fitted()
        if self.tokenizer is None or not self.config.model_name:
            raise ValueError("the detector has no tokenizer or no config.model_name, and could not be loaded again.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.sae_repo is None:
            save_many(self.saes, folder / SAES)
        if self.maps is not None:
            save_maps(self.maps, folder / MAPS)
        self.tokenizer.save_pretrained(folder)
        save_classifier(classifier, folder)
        self.config.architectures = [type(self).__name__]
        with atomic_write(folder / CONFIG) as file:
            file.write(self.config.to_json_string().encode())
        write_detector_card(folder, self, repo_id)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload hallucination detector",
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes in one commit; returns its address.

        Raises:
            ValueError: `config.model_name` or `config.sae_repo` is nothing on the Hub, so nobody could load it.
        """
        for name in ("model_name", "sae_repo"):
            value = getattr(self.config, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(
                    f"config.{name}={value!r} is no Hub id, so nobody else could load the detector. Set it to one."
                )
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id)
            options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
            return push_folder(folder, repo_id, commit_message=commit_message, **options)
