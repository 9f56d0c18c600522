"""What the command lines of all areas share: flags, errors in one line, a quiet terminal."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any

import typer


def option(help: str, panel: str, *flags: str, **more: Any) -> Any:
    """An option of a command, in one panel of its help."""
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


# Flags of `RunOptions`; the type of a command's parameter.
Model = Annotated[str, option("Causal LM: Hub id or folder.", "Data")]
Rows = Annotated[
    str, option("Training rows: Hub id (or id:config), .jsonl .json .csv .parquet .txt, saved folder.", "Data")
]
OutputDir = Annotated[str, option("Folder of everything the run writes.", "Data")]
Split = Annotated[str | None, option("Split of the dataset, such as train or train\\[:1000].", "Data")]
ValSplit = Annotated[str | None, option("Split of a validation dataset.", "Data")]
TextColumn = Annotated[str | None, option("Column to train on; default by the usual names.", "Data")]
PromptColumn = Annotated[str | None, option("Prompt column; several: a,b.", "Data")]
ResponseColumn = Annotated[str | None, option("Response column, all that the loss counts.", "Data")]
MaxLength = Annotated[int, option("Tokens kept of each row.", "Data")]
Epochs = Annotated[float, option("Passes over the training rows.", "Training")]
MaxSteps = Annotated[int, option("Optimizer steps, instead of --epochs.", "Training")]
BatchSize = Annotated[int, option("Rows in one forward.", "Training")]
AccumulationSteps = Annotated[int, option("Forwards in one step.", "Training")]
Seed = Annotated[int, option("Of adapters, data order and rows held out.", "Training")]
Bf16 = Annotated[bool, option("Compute in bfloat16.", "Training", "--bf16")]
SaveSteps = Annotated[int, option("Steps between checkpoints.", "Training")]
ReportTo = Annotated[str, option("Where to log, such as tensorboard.", "Training")]
Resume = Annotated[bool, option("Continue the run in --output-dir.", "Training", "--resume")]


@contextmanager
def one_line_errors(options: type | None = None) -> Iterator[None]:
    """Says what is wrong in one line, in the words of the command line; a bug keeps its traceback.

    Args:
        options: dataclass whose fields are flags of the command, spelled with hyphens.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        message = " ".join(str(error).split())
        if options is not None:
            names = "|".join(options.__dataclass_fields__)
            message = re.sub(rf"\b({names})=(True\b)?", _as_flag, message)
        typer.secho(f"Error: {message}", fg="red", err=True)
        raise typer.Exit(1) from error


def _as_flag(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')}" + ("" if match[2] else " ")


def add_commands(app: typer.Typer, package: str, commands: Mapping[str, tuple[str, str, str]]) -> None:
    """Adds commands that hand their words to a parser of their own, with that workflow's flags alone.

    Args:
        app: of an area.
        package: the area's package, imported once a command is run.
        commands: name -> its module in the package, its function, which takes the words, and what it does.
    """
    for name, (module, function, text) in commands.items():
        _add_command(app, name, f"{package}.{module}", function, text)


def _add_command(app: typer.Typer, name: str, module: str, function: str, text: str) -> None:
    # The workflow's own parser answers --help, and knows which words are flags.
    @app.command(
        name,
        help=text,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> None:
        quiet_imports()
        with one_line_errors():
            from huggingface_hub.errors import StrictDataclassError

            try:
                getattr(import_module(module), function)(context.args)
            except StrictDataclassError as error:  # a field of a configuration of the wrong type
                raise ValueError(str(error)) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Tells who interrupts a run how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("\nInterrupted. The same command with --resume continues it.", fg="red", err=True)
        raise


def quiet_imports() -> None:
    """Keeps bitsandbytes from warning, when PEFT imports it, of kernels that it does without."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet() -> None:
    """Leaves the terminal to the progress bars and our own lines."""
    quiet_imports()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keeps transformers from showing a bar for the files it reads and writes."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
