"""A run told by one flat mapping of flags, as a search or a YAML file has it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import HfArgumentParser

from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.training.options import TrainOptions
from hf_gradtools.nanogpt.training.starting import RESUME, SCRATCH, check_names, config_fields
from hf_gradtools.workflow.flags import given_flags, parser_for


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.training.workflow import TrainResult

__all__ = ["ModelFlags", "config_of_flags", "run_flags", "train_parser"]

PROG = "hf-gradtools nanogpt train"
# Headings of the model's flags, by how their names begin.
HEADINGS = {
    "Model: norms": ("norm_", "use_pre_ln", "use_peri_ln", "use_post_ln", "prmsnorm", "hsnorm", "dact"),
    "Model: positions": ("use_rotary", "use_fire", "use_abs_pos", "rope", "fire"),
    "Model: softmax": ("softmax", "consmax", "softermax", "strongermax", "sigmoidmax", "relu", "soft", "sq", "poly"),
    "Model: MLP": ("mlp", "activation", "kan", "use_parallel_mlp"),
    "Model: linear maps": ("linear", "quantize"),
    "Model: attention": ("attention", "attn", "use_", "window", "flash", "ssm", "n_qk", "n_v", "final_logit"),
}


def _heading(name: str) -> str:
    return next((heading for heading, starts in HEADINGS.items() if name.startswith(starts)), "Model: sizes")


def _model_flags() -> type:
    """A dataclass of the fields of `NanoGPTConfig` that describe a model, under headings."""
    types = get_annotations(NanoGPTConfig, eval_str=True)
    aliases: dict[str, list[str]] = {"tie_word_embeddings": ["--wte_weight_tying"]}
    fields = []
    for name, known in sorted(config_fields().items(), key=lambda item: _heading(item[0]) != "Model: sizes"):
        metadata = {"group": _heading(name), "aliases": aliases.get(name, [])}
        fields.append((name, types[name], dataclasses.field(default=known.default, metadata=metadata)))
    made = dataclasses.make_dataclass("ModelFlags", fields)
    made.__doc__ = NanoGPTConfig.__doc__
    return made


ModelFlags = _model_flags()


def train_parser() -> HfArgumentParser:
    """The flags of a run: every option and every field of the model, and `--config`, a YAML file of the same."""
    parser = parser_for(
        TrainOptions, ModelFlags, prog=PROG, description="Train a nanoGPT model whose parts are chosen by name."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; those typed count more.")
    return parser


@cache
def _raising_parser() -> Any:
    parser = train_parser()
    parser.raises = True
    return parser


def run_flags(flags: Mapping[str, Any], *, echo: Callable[[str], None] | None = None) -> TrainResult:
    """Trains as a mapping says.

    Args:
        flags (`Mapping[str, Any]`): options of `TrainOptions` and fields of `NanoGPTConfig`; None means the default.
            Values may be texts, as on a command line. With `init_from="resume"`, what is left out is as the run in
            `out_dir` was begun or last resumed.
        echo (`Callable`, *optional*): see [`train`].

    Raises:
        ValueError: a name is unknown, or a value does not fit.
    """
    from hf_gradtools.nanogpt.training.workflow import stored_options, train  # not for --help

    options, config = split_flags(flags)
    if options.get("init_from") == RESUME:
        options = {**stored_options(Path(options.get("out_dir", TrainOptions.out_dir))), **options}
    return train(TrainOptions(**options), config, echo=echo)


def split_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a run, and the fields of its model, each of the type that it should have."""
    given: dict[str, Any] = {}
    for name, value in flags.items():
        own = NanoGPTConfig.attribute_map.get(name, name)
        if value is not None and given.setdefault(own, value) != value:
            raise ValueError(f"{own} is given twice, as {name}={value!r} too. Leave it in one place.")
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    check_names(given, names | set(config_fields()))
    read = given_flags(_raising_parser(), [word for name, value in given.items() for word in _words(name, value)])
    return {n: v for n, v in read.items() if n in names}, {n: v for n, v in read.items() if n not in names}


def config_of_flags(flags: Mapping[str, Any]) -> NanoGPTConfig:
    """The model that flags describe; its vocabulary is that of the dataset, unless they say another.

    Raises:
        ValueError: it is not made from scratch, or a flag is wrong.
    """
    options, model = split_flags(flags)
    if (init_from := options.get("init_from", SCRATCH)) != SCRATCH:
        raise ValueError(f"init_from={init_from!r}: only a model that is made from scratch is described by its flags.")
    if "vocab_size" not in model:
        data = TokenFolder(options.get("dataset", TrainOptions.dataset), options.get("data_dtype"))
        model["vocab_size"] = data.vocab_size
    return NanoGPTConfig(**model)


def _words(name: str, value: Any) -> list[str]:
    """A value as on a command line."""
    if isinstance(value, (list, tuple)):
        if not value or any(isinstance(item, str) and item.startswith("--") for item in value):
            raise ValueError(f"{name}={value!r} must have elements, and none that is a flag.")
        return [f"--{name}", *("none" if item is None else str(item) for item in value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}"]
