"""`pipeline("hallucination-detection", model=...)`: transformers' pipeline around a [`HallucinationDetector`]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import Pipeline

from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector
from hf_gradtools.ghosttrack.detection.detector_outputs import DetectorOutput, as_text


__all__ = ["TASK", "HallucinationDetectionPipeline"]

TASK = "hallucination-detection"


class HallucinationDetectionPipeline(Pipeline):
    """Says of texts how likely they are hallucinated.

    ```python
    import hf_gradtools
    from transformers import pipeline

    detect = pipeline("hallucination-detection", model="user/detector")
    detect({"question": "Who wrote Faust?", "answer": "Goethe"})["probability"]
    ```

    A text is a `str`, all of which is claimed; a `(prompt, answer)`; a `{"question", "answer"}`, put into the
    detector's template; or a `{"text", "answer_start"}`. Lists, datasets and generators of them are read `batch_size`
    at a time.

    Each result is `{"label", "score", "probability", "span", "features", "tracks", "plot"}`: `score` is the
    probability of the label, `probability` that of a hallucination, `plot` an SVG of the tracks.

    Args:
        return_tracks (`bool`, defaults to `True`): track features through the layers.
        plot (`bool`, defaults to `True`): draw the tracks; without them there is nothing to draw.
        top_features (`int`, defaults to 10): features told.
    """

    _load_tokenizer = False  # the detector has its own
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, model: HallucinationDetector, *args: Any, **kwargs: Any):
        if not isinstance(model, HallucinationDetector):
            raise ValueError(
                f"model is a {type(model).__name__}; the task {TASK!r} needs a HallucinationDetector. Pass one, or "
                "the folder or Hub id of one."
            )
        tokenizer = kwargs.pop("tokenizer", None)
        if tokenizer is not None:
            model.tokenizer = tokenizer
        super().__init__(model, *args, tokenizer=model.tokenizer, **kwargs)

    def _sanitize_parameters(
        self,
        return_tracks: bool | None = None,
        plot: bool | None = None,
        top_features: int | None = None,
        **others: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if others:
            raise TypeError(f"{min(others)} is no parameter of {TASK!r}; it has return_tracks, plot and top_features.")
        forward = {"with_tracks": return_tracks, "top_features": top_features}
        return {}, _given(forward), _given({"plot": plot})

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, list) and not inputs:
            return []
        if isinstance(inputs, Dataset):  # transformers knows torch's
            inputs = (row for row in inputs)
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: Any, row: int = 0) -> dict[str, Any]:
        text, answer_start = as_text(input_, self.model.config.prompt_template, row)
        return {"text": text, "answer_start": answer_start}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> DetectorOutput:
        return self._predict([input_tensors], options)[0]

    def postprocess(self, model_outputs: DetectorOutput, plot: bool = True) -> dict[str, Any]:
        return model_outputs.to_dict(plot=plot)

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[dict[str, Any]]:
        """Batches of texts as they are: the detector pads them by length itself."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is no number of texts; need at least 1. Pass batch_size=16.")
        examples = (self.preprocess(example, row=row, **preprocess_params) for row, example in enumerate(inputs))
        while batch := list(islice(examples, batch_size)):
            for output in self._predict(batch, forward_params):
                yield self.postprocess(output, **postprocess_params)

    def _predict(self, batch: list[dict[str, Any]], options: dict[str, Any]) -> list[DetectorOutput]:
        with self.device_placement():
            return self.model.predict(batch, batch_size=len(batch), **options)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
