"""What a detector says of a text, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_gradtools.ghosttrack.classifiers.frozen import (
    Features,
    FrozenClassifier,
    FrozenLinear,
    dense_columns,
)


if TYPE_CHECKING:
    from markupsafe import Markup

    from hf_gradtools.ghosttrack.tracking.tracking import Tracks

__all__ = ["DetectorOutput", "FeatureContribution", "as_text", "contributions"]


class FeatureContribution(NamedTuple):
    """What one feature adds to the logit of a text.

    Attributes:
        name (`str`): `"layers.5/123"` for feature 123 of the autoencoder of `layers.5`, or the name of a feature of
            tracks.
        value (`float`): its value in the text; of a latent the largest activation.
        contribution (`float`): what it adds to the logit of "hallucinated"; contributions and the intercept sum to it.
    """

    name: str
    value: float
    contribution: float


@dataclass(frozen=True, eq=False)
class DetectorOutput:
    """A detector's verdict on one text.

    Attributes:
        label (`str`): `"HALLUCINATED"` or `"SUPPORTED"`, or what the detector's configuration calls them.
        score (`float`): probability of that label.
        probability (`float`): that the text is hallucinated.
        features (`list[FeatureContribution]`): those that weigh most, the largest first; empty where the classifier
            is not linear, for trees have no such sum.
        span (`tuple[int, int]`): which of the text's tokens count, begin and end.
        tracks ([`Tracks`], *optional*): of the text, as they went through the layers; their positions are counted
            from the first token of the span.
    """

    label: str
    score: float
    probability: float
    features: list[FeatureContribution]
    span: tuple[int, int]
    tracks: Tracks | None = None

    def plot(self, **options: Any) -> Markup:
        """The strongest tracks as SVG; options are those of [`plot_tracks`].

        Raises:
            ValueError: the text was not tracked.
        """
        from hf_gradtools.ghosttrack.report.track_plot import plot_tracks, points_of

        if self.tracks is None:
            raise ValueError("tracks=None: the text was not tracked. Call predict(..., with_tracks=True).")
        points, layers = points_of(self.tracks, 0)
        return plot_tracks(points, **{"layers": layers, **options})

    def to_dict(self, plot: bool = True) -> dict[str, Any]:
        """As JSON has it; `"tracks"` and `"plot"` are left out of a text that was not tracked."""
        values: dict[str, Any] = {"label": self.label, "score": self.score, "probability": self.probability}
        values["span"] = list(self.span)
        values["features"] = [feature._asdict() for feature in self.features]
        if self.tracks is not None:
            values["tracks"] = [[step._asdict() for step in track.steps] for track in self.tracks.of_text(0)]
            if plot:
                values["plot"] = str(self.plot())
        return values


def contributions(
    classifier: FrozenClassifier, features: Features, names: Sequence[str], top: int
) -> list[list[FeatureContribution]]:
    """Of each row the `top` features that change a linear classifier's logit most.

    A feature's part is that against its value at rest: 0 for latents, which are mostly absent, and the mean of the
    training rows for features that were centred. An ensemble's logit is no sum of its members', so it has none.

    Args:
        classifier ([`FrozenClassifier`]): what decides.
        features (`[T, P]`): dense or scipy sparse.
        names (`Sequence[str]`): of the P columns.
        top (`int`): how many.
    """
    n_texts = features.shape[0]
    if not isinstance(classifier, FrozenLinear):
        return [[] for _ in range(n_texts)]
    weights = classifier.coef / classifier.scale
    found = []
    for row in range(n_texts):
        values = dense_columns(features[row : row + 1], classifier.columns)[0]
        parts = (values - classifier.mean) * weights
        order = np.argsort(-np.abs(parts), kind="stable")[:top]
        found.append(
            [
                FeatureContribution(names[classifier.columns[i]], float(values[i]), float(parts[i]))
                for i in order
                if parts[i] != 0
            ]
        )
    return found


def as_text(example: Any, template: str, row: int = 0) -> tuple[str, int]:
    """A text and where its answer begins.

    Args:
        example: a text, all of which is claimed; a prompt and its answer; `{"question", "answer"}`, put into the
            template; or `{"text", "answer_start"}`.
        template (`str`): such as `"Question: {question}\\nAnswer: {answer}"`.
        row (`int`): its number, for errors.

    Raises:
        ValueError: it is none of these, or empty.
    """
    found = _text_and_start(example, template)
    if found is None:
        raise ValueError(
            f"text {row} is {example!r:.200}; need a text, (prompt, answer), {{'question': ..., 'answer': ...}} or "
            "{'text': ..., 'answer_start': 12}. Pass one of those."
        )
    text, start = found
    if not text[start:].strip():
        raise ValueError(f"text {row} is empty, or its answer is: {example!r:.200}. Leave it out.")
    return text, start


def _text_and_start(example: Any, template: str) -> tuple[str, int] | None:
    if isinstance(example, str):
        return example, 0
    if isinstance(example, tuple) and len(example) == 2 and all(isinstance(part, str) for part in example):
        return example[0] + example[1], len(example[0])
    if not isinstance(example, Mapping):
        return None
    strings = {key: value for key, value in example.items() if isinstance(value, str)}
    is_whole = "text" in strings and "answer_start" in example  # as rows of a detection data set are
    if {"question", "answer"} <= strings.keys() and not is_whole:
        head, between = template.removesuffix("{answer}").split("{question}")
        prompt = head + strings["question"] + between
        return prompt + strings["answer"], len(prompt)
    start = example.get("answer_start", 0)
    if "text" in strings and isinstance(start, int) and not isinstance(start, bool):
        return strings["text"], start
    return None
