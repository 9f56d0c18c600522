"""The model card of a folder of autoencoders: the figures that are kept with each, and no other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_gradtools import __version__
from hf_gradtools.hub import CARD_FILE, is_hub_id, write_card
from hf_gradtools.sae.configuration_sae import WITH_K, SAEConfig


__all__ = ["MARKER", "is_ours", "write_sae_card"]

TEMPLATE = "sae_card.md"
TAGS = ["hf_gradtools", "sparse-autoencoder", "mechanistic-interpretability", "saelens"]
# A card with this line is written anew; one without it is somebody's own.
MARKER = "<!-- Written by hf_gradtools whenever an autoencoder is saved here. Remove this line to keep your edits. -->"
FIGURES = {
    "FVU": ("fvu", "{:.4f}", "FVU: share of the variance that reconstructions leave unexplained."),
    "L0": ("l0", "{:.1f}", "L0: mean number of active features of a token."),
    "dead": ("dead_fraction", "{:.2%}", "Dead: share of features that no token of the evaluation activated."),
    "CE recovered": (
        "recovered",
        "{:.2%}",
        "CE recovered: one minus what reconstructions add to the model's cross-entropy, as a share of what zeros add.",
    ),
    "tokens": ("num_tokens", "{:,.0f}", "Tokens: of the evaluation."),
}
TRAINED_ON = "trained on"

WITH_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradtools.sae import SAE
from hf_gradtools.sae.hookpoints import capture

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}")
sae = SAE.from_pretrained("{repo_id}", hookpoint="{hookpoint}")

with capture(model, ["{hookpoint}"]) as hidden_states:
    model(**tokenizer("a b c", return_tensors="pt"))
latents = sae.encode(hidden_states["{hookpoint}"])  # [1, tokens, {d_sae}]
reconstruction = sae.decode(latents)"""
WITHOUT_MODEL = """\
import torch

from hf_gradtools.sae import SAE

sae = SAE.from_pretrained("{repo_id}"{which})
hidden_states = torch.randn(1, 10, {d_in})  # of your model
latents = sae.encode(hidden_states)  # [1, 10, {d_sae}]
reconstruction = sae.decode(latents)"""


def write_sae_card(
    folder: str | os.PathLike[str], configs: Mapping[str, SAEConfig], repo_id: str | None = None
) -> None:
    """Writes `README.md`, whole or not at all; folders of this machine are not named in it.

    Args:
        folder (`str` or `os.PathLike`): where to.
        configs (`Mapping[str, SAEConfig]`): by the folder that each autoencoder has there, in the order to show.
        repo_id (`str`, *optional*): on the Hub; the folder's name by default.
    """
    repo_id = repo_id or Path(folder).absolute().name
    models = list(dict.fromkeys(config.model_name for config in configs.values() if is_hub_id(config.model_name)))
    figures = {name: _figures(config) for name, config in configs.items()}
    shown = [column for column in (TRAINED_ON, *FIGURES) if any(column in row for row in figures.values())]
    write_card(
        folder,
        TEMPLATE,
        ModelCardData(library_name="hf_gradtools", tags=TAGS, base_model=models or None),
        title=repo_id.split("/")[-1],
        marker=MARKER,
        models=[f"[{model}](https://huggingface.co/{model})" for model in models],
        columns=["hookpoint", "activation", "width", "features", *shown],
        rows=[
            [f"`{name or config.hookpoint or '.'}`", _activation(config), config.d_in, config.d_sae]
            + [figures[name].get(column, "") for column in shown]
            for name, config in configs.items()
        ],
        legend=[FIGURES[column][2] for column in shown if column in FIGURES] + _left_out(configs.values(), shown),
        code=_code(repo_id, *next(iter(configs.items()))),
        version=__version__,
    )


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's card may be written anew: there is none, or it is one of ours that nobody claimed."""
    file = Path(folder) / CARD_FILE
    return not file.exists() or MARKER in file.read_text(encoding="utf-8", errors="replace")


def _activation(config: SAEConfig) -> str:
    text = f"{config.activation}, k = {config.k}" if config.activation in WITH_K else config.activation
    return f"{text}, matryoshka" if config.matryoshka_widths else text


def _figures(config: SAEConfig) -> dict[str, str]:
    """What the configuration's metadata tells of an evaluation and of training."""
    evaluation = _mapping(config.metadata.get("evaluation"))
    values = {**config.metadata, **evaluation, **_mapping(evaluation.get("cross_entropy"))}
    texts = {
        column: form.format(values[key]) for column, (key, form, _) in FIGURES.items() if _is_number(values.get(key))
    }
    tokens = _mapping(config.metadata.get("training")).get("tokens")
    return texts | ({TRAINED_ON: f"{tokens:,} tokens"} if _is_number(tokens) else {})


def _left_out(configs: Iterable[SAEConfig], shown: Sequence[str]) -> list[str]:
    """Which tokens the evaluation that training ends with does not count."""
    training = [_mapping(config.metadata.get("training")) for config in configs]
    ratios = {options["outlier_ratio"] for options in training if _is_number(options.get("outlier_ratio"))}
    if not ratios or "FVU" not in shown:
        return []
    listed = " or ".join(f"{ratio:g}" for ratio in sorted(ratios))
    return [
        f"Left out, in training too: hidden states more than {listed} times as far from the median as half of all."
    ]


def _code(repo_id: str, name: str, config: SAEConfig) -> str:
    if name and name == config.hookpoint and is_hub_id(config.model_name):
        return WITH_MODEL.format(model=config.model_name, repo_id=repo_id, hookpoint=name, d_sae=config.d_sae)
    which = f', hookpoint="{name}"' if name else ""
    return WITHOUT_MODEL.format(repo_id=repo_id, which=which, d_in=config.d_in, d_sae=config.d_sae)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
