"""What the command lines of all areas share: flags, errors in one line, a quiet terminal."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
