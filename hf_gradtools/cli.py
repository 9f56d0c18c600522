"""`hf-gradtools`: one command line, with one group of commands per area.

Bodies of commands import what they need, so that `--help` answers at once.
"""

from typing import Annotated

import typer

from hf_gradtools import __version__
from hf_gradtools.ghost.cli import app as ghost_app


app = typer.Typer(
    name="hf-gradtools",
    help="Per-sample gradient information during ordinary Hugging Face training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(ghost_app, name="ghost")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hf-gradtools {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Per-sample gradient information during ordinary Hugging Face training."""


if __name__ == "__main__":
    app(prog_name="hf-gradtools")
