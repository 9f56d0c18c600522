"""`hf-gradtools sae`: each command hands its words to a parser of its own, with that workflow's flags alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from typing import Any

import typer

from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.options import BrowseOptions, EvalOptions, ExtractOptions, PushOptions, TrainOptions
from hf_gradtools.sae.training_config import SAETrainingConfig
from hf_gradtools.workflow.terminal import add_commands, one_line_errors, quiet


__all__ = ["browse_main", "eval_main", "extract_main", "push_main", "sae_app", "train_main"]

# Command: its module, its function, and what it does.
COMMANDS = {
    "extract": (
        "cli",
        "extract_main",
        "Write a model's hidden states to disk, of all chosen layers in one pass.",
    ),
    "train": ("cli", "train_main", "Train autoencoders of all chosen layers in one pass, from a store or a model."),
    "eval": ("cli", "eval_main", "Measure autoencoders: reconstruction, sparsity, and the model's loss with them."),
    "browse": ("cli", "browse_main", "Write HTML pages of what features respond to."),
    "push": ("cli", "push_main", "Upload autoencoders to the Hub."),
}
# Fields of SAEConfig that the activations and other flags tell.
NO_FLAGS = ("d_in", "d_sae", "hookpoint", "model_name", "matryoshka_widths", "metadata")

sae_app = typer.Typer(help="Sparse autoencoders of every layer of a causal LM.", no_args_is_help=True)

add_commands(sae_app, "hf_gradtools.sae", COMMANDS)


def extract_main(argv: list[str] | None = None) -> None:
    """Extracts as the command line says.

    Args:
        argv (`list[str]`, *optional*): the words after the command; default `sys.argv`'s.
    """
    _run("extract", lambda commands, options: commands.extract_activations(options), argv, ExtractOptions)


def train_main(argv: list[str] | None = None) -> None:
    """Trains as the command line says. `argv` as for [`extract_main`]."""
    kinds = (TrainOptions, dict, SAETrainingConfig)
    _run("train", lambda commands, *options: commands.train(*options), argv, *kinds)


def eval_main(argv: list[str] | None = None) -> None:
    """Evaluates as the command line says. `argv` as for [`extract_main`]."""
    _run("eval", lambda commands, options: commands.evaluate_saved(options), argv, EvalOptions)


def browse_main(argv: list[str] | None = None) -> None:
    """Writes pages as the command line says. `argv` as for [`extract_main`]."""
    _run("browse", lambda commands, options: commands.browse(options), argv, BrowseOptions)


def push_main(argv: list[str] | None = None) -> None:
    """Uploads as the command line says. `argv` as for [`extract_main`]."""
    _run("push", lambda commands, options: commands.push(options), argv, PushOptions)


def _run(command: str, body: Callable[..., None], argv: list[str] | None, *kinds: type) -> None:
    """Parses the words into options, and runs a body whose errors are told in one line.

    A `dict` among the kinds stands for the fields of [`SAEConfig`], which is made once the activations are known.
    """
    sources = [SAEConfig if kind is dict else kind for kind in kinds]
    names = list(dict.fromkeys(field.name for source in sources for field in fields(source)))
    try:
        with one_line_errors(make_dataclass("Flags", names)):
            quiet()
            from hf_gradtools.workflow.flags import given_flags, parser_for

            parser = parser_for(
                *sources, prog=f"hf-gradtools sae {command}", description=COMMANDS[command][2], skip=NO_FLAGS
            )
            given = given_flags(parser, argv)
            options = [kind(**_of(source, given)) for kind, source in zip(kinds, sources, strict=True)]
            from hf_gradtools.sae import commands

            body(commands, *options)
    except typer.Exit as ended:  # outside of a typer app nothing else would catch it
        raise SystemExit(ended.exit_code) from ended
    except KeyboardInterrupt:
        hint = {"extract": " The same command goes on.", "train": " The same command with --resume continues it."}
        typer.secho(f"\nInterrupted.{hint.get(command, '')}", fg="red", err=True)
        raise SystemExit(130) from None


def _of(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}
