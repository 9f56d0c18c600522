"""A self-contained HTML page of an autoencoder's features: what it says is here, its look in `templates/`."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.sae.contexts import NONE, Contexts, FeatureContexts
from hf_gradtools.sae.logit_lens import LogitLens, logit_lens
from hf_gradtools.sae.metrics import SAEMetrics, density_histogram
from hf_gradtools.sae.modeling_sae import SAE


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


__all__ = ["interesting_features", "write_browser"]

COMMON = 0.05  # share of tokens above which a feature says little about any one of them
VISIBLE = {"\n": "↵", "\r": "↵", "\t": "⇥"}
CHART = {"width": 720, "height": 150, "left": 44, "bottom": 34, "top": 12}


def write_browser(
    output_path: str | os.PathLike[str],
    contexts: FeatureContexts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sae: SAE | None = None,
    model: PreTrainedModel | None = None,
    features: Sequence[int] | None = None,
    num_features: int = 50,
    num_examples: int | None = None,
    num_logits: int = 10,
    metrics: SAEMetrics | None = None,
    title: str | None = None,
    subtitle: str = "",
) -> Path:
    """Writes one HTML file, without scripts or anything from the network, that shows what features respond to.

    Args:
        output_path (`str` or `os.PathLike`): the file to make; it appears whole or not at all.
        contexts ([`~hf_gradtools.sae.contexts.FeatureContexts`]): examples of the features.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        sae ([`SAE`], *optional*): with `model`, for the tokens that each feature promotes and suppresses.
        model (`PreTrainedModel`, *optional*): a causal LM with its head.
        features (`Sequence[int]`, *optional*): which features; default [`interesting_features`].
        num_features (`int`, defaults to 50): how many of these.
        num_examples (`int`, *optional*): of each kind; default as many as `contexts` holds.
        num_logits (`int`, defaults to 10): promoted and suppressed tokens.
        metrics ([`~hf_gradtools.sae.metrics.SAEMetrics`], *optional*): for the key figures of the top.
        title (`str`, *optional*): heading; default names the hookpoint.
        subtitle (`str`, *optional*): such as the model and the corpus.

    Returns:
        `Path`: the file written.

    Raises:
        ValueError: if there is no feature to show, `contexts` lacks one, or only one of `sae` and `model` is given.
    """
    if (sae is None) != (model is None):
        raise ValueError("sae and model go together, for the logits of features. Pass both, or neither.")
    if features is None:
        features = interesting_features(contexts, num_features)
    rows = _rows_of(contexts, features)
    lens = logit_lens(model, sae, features, num_logits) if sae is not None and model is not None else None
    tokens = _Tokens(tokenizer)
    entries = [
        _entry(contexts, row, tokens, lens, place, num_examples or contexts.top.values.shape[1])
        for place, row in enumerate(rows)
    ]
    shown = np.array([entry["density"] for entry in entries])
    html = _template().render(
        title=title or f"Features of {contexts.hookpoint}",
        subtitle=subtitle,
        created=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        figures=_figures(contexts, metrics),
        chart=_density_chart(contexts.density, contexts.num_tokens, shown),
        entries=entries,
        neighbours=[None, *(entry["feature"] for entry in entries), None],
    )
    path = Path(output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", errors="replace"))
    return path


def interesting_features(contexts: FeatureContexts, count: int = 50) -> list[int]:
    """The features that are strong and rare: median of their strongest examples times −log10 of their density.

    A rule of thumb; the median, because a few tokens (attention sinks) can be a hundred times stronger than all
    others. Features with fewer examples than `contexts` has room for, or active on more than 5 % of tokens, come after
    all others; those that are never active do not come at all.

    Raises:
        ValueError: if `count` is below 1 or no feature was ever active.
    """
    if count < 1:
        raise ValueError(f"num_features={count}; need at least 1. Pass num_features=1 or more.")
    density, examples = contexts.density[contexts.features], contexts.top.counts
    alive = np.flatnonzero(examples)
    if not len(alive):
        raise ValueError(f"no feature of {contexts.hookpoint} was active on {contexts.num_tokens} tokens. Pass more.")
    strength = _typical_peaks(contexts.top)[alive]
    score = strength * -np.log10(density[alive])
    typical = (examples[alive] == contexts.top.values.shape[1]) & (density[alive] <= COMMON)
    order = np.lexsort((-score, ~typical))
    return [int(feature) for feature in contexts.features[alive[order[:count]]]]


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("browser.html.j2")


def _typical_peaks(top: Contexts) -> np.ndarray:
    """`[F]`: the median of each feature's strongest examples; 0 where there are none."""
    values = np.where(top.sequences == NONE, np.nan, top.values)
    values[top.counts == 0] = 0
    return np.nanmedian(values, axis=1)


class _Tokens:
    """Token ids as text to look at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = visible(self.tokenizer.decode([token]))
        return self.known[token]


def visible(text: str) -> str:
    """Text with a sign for what would not be seen, or would change how its neighbours are: breaks and controls."""
    signs = "".join(VISIBLE.get(c, "�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c) for c in text)
    return signs or "∅"


def _rows_of(contexts: FeatureContexts, features: Sequence[int]) -> list[int]:
    places = {int(feature): row for row, feature in enumerate(contexts.features)}
    if not len(features):
        raise ValueError("features is empty; need at least 1. Pass features=None for the most interesting ones.")
    for feature in features:
        if feature not in places:
            raise ValueError(
                f"features={feature}, of which contexts has no examples. Pass features among its {len(places)}, or "
                "collect that one too."
            )
    return [places[feature] for feature in features]


def _entry(
    contexts: FeatureContexts, row: int, tokens: _Tokens, lens: LogitLens | None, place: int, most: int
) -> dict[str, Any]:
    feature = int(contexts.features[row])
    density = float(contexts.density[feature])
    scale = float(_typical_peaks(contexts.top)[row])
    top = _examples(contexts.top, row, tokens, scale, range(min(most, int(contexts.top.counts[row]))))
    drawn = np.argsort(-contexts.sampled.values[row][: contexts.sampled.counts[row]], kind="stable")
    spread = drawn[np.unique(np.linspace(0, len(drawn) - 1, min(most, len(drawn))).round().astype(int))]
    return {
        "feature": feature,
        "density": density,
        "percent": _percent(density),
        "peak": _number(float(contexts.top.values[row].max())),
        "on": top[0]["on"] if top else None,
        "top": top,
        "quantiles": _examples(contexts.sampled, row, tokens, scale, spread),
        "promoted": _logits(lens.promoted[place], lens.promoted_logits[place], tokens) if lens else [],
        "suppressed": _logits(lens.suppressed[place], lens.suppressed_logits[place], tokens) if lens else [],
    }


def _examples(
    contexts: Contexts, row: int, tokens: _Tokens, scale: float, places: Sequence[int] | np.ndarray | range
) -> list[dict[str, Any]]:
    examples = []
    for i in places:
        ids, activations = contexts.token_ids[row, i], contexts.activations[row, i]
        runs: list[dict[str, Any]] = []
        for at, (token, activation) in enumerate(zip(ids.tolist(), activations.tolist(), strict=True)):
            if token == NONE:
                continue
            is_peak = at == contexts.before
            if activation <= 0 and not is_peak and runs and not runs[-1]["shade"] and not runs[-1]["peak"]:
                runs[-1]["text"] += tokens[token]
                continue
            shade = round(100 * min(1.0, activation / scale)) if activation > 0 else 0
            runs.append(
                {
                    "text": tokens[token],
                    "shade": max(4, shade) if activation > 0 else 0,
                    "value": _number(activation),
                    "peak": is_peak,
                }
            )
        value = float(contexts.values[row, i])
        examples.append(
            {
                "value": _number(value),
                "place": f"sequence {contexts.sequences[row, i]}, position {contexts.positions[row, i]}",
                "on": tokens[int(ids[contexts.before])],
                "runs": runs,
            }
        )
    return examples


def _logits(ids: np.ndarray, logits: np.ndarray, tokens: _Tokens) -> list[tuple[str, str, int]]:
    """(token, logit, width of its bar in percent)."""
    largest = max(float(np.abs(logits).max()), 1e-12)
    return [
        (tokens[int(token)], f"{logit:+.2f}".replace("-", "−"), round(100 * abs(float(logit)) / largest))
        for token, logit in zip(ids, logits, strict=True)
    ]


def _figures(contexts: FeatureContexts, metrics: SAEMetrics | None) -> Mapping[str, str]:
    dead = float((contexts.density == 0).mean())
    figures = {
        "features": f"{len(contexts.density):,}",
        "tokens": f"{contexts.num_tokens:,}",
        "active a token": f"{contexts.density.sum():.1f}",
        "never active": _percent(dead),
    }
    if metrics is not None and metrics.fvu is not None:
        figures["variance unexplained"] = f"{metrics.fvu:.3f}"
    if metrics is not None and metrics.cross_entropy is not None and metrics.cross_entropy.recovered is not None:
        figures["loss recovered"] = f"{metrics.cross_entropy.recovered:.3f}"
    return figures


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(share: float) -> str:
    if share == 0:
        return "0 %"
    return f"{100 * share:.{max(0, 1 - math.floor(math.log10(100 * share)))}f} %" if share < 1 else "100 %"


def _density_chart(density: np.ndarray, num_tokens: int, shown: np.ndarray) -> dict[str, Any]:
    """Bars, marks of the features shown, and labels of a histogram, in pixels."""
    edges, counts = density_histogram(density, num_tokens)
    left, top, width = CHART["left"], CHART["top"], CHART["width"] - CHART["left"] - 8
    floor = CHART["height"] - CHART["bottom"]
    most = max(1, *counts)

    def x_of(log_density: float) -> float:
        return round(left + width * (log_density - edges[0]) / (edges[-1] - edges[0]), 1)

    bars = [
        {"x": x_of(a) + 0.5, "width": x_of(b) - x_of(a) - 1, "height": round((floor - top) * n / most, 1),
         "label": f"{n:,} features at {_percent(10**a)} to {_percent(10**b)} of tokens"}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]  # fmt: skip
    return {
        **CHART,
        "floor": floor,
        "bars": bars,
        "most": f"{most:,}",
        "ticks": [(x_of(decade), f"{100 * 10.0**decade:g} %") for decade in range(round(edges[0]), 1)],
        "marks": [x_of(float(v)) for v in np.log10(shown[shown > 0])],
    }
