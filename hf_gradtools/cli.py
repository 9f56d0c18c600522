"""`hf-gradtools`: one command line, with one group of commands per area.

Bodies of commands import what they need, so that `--help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_gradtools import __version__
from hf_gradtools.ghost.cli import app as ghost_app
from hf_gradtools.ghosttrack.cli import app as ghosttrack_app
from hf_gradtools.gradmem.cli import gradmem_app
from hf_gradtools.nanogpt.cli import app as nanogpt_app
from hf_gradtools.sae.cli import sae_app
from hf_gradtools.workflow.terminal import quiet_imports


class _GritGroup(TyperGroup):
    """The commands of `hf_gradtools.grit.cli`, imported once one is asked for: importing that area imports PEFT."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)

    def _loaded(self) -> Any:
        quiet_imports()
        return typer.main.get_command(import_module("hf_gradtools.grit.cli").app)


app = typer.Typer(
    name="hf-gradtools",
    help="Gradients as first-class objects of the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(ghost_app, name="ghost")
app.add_typer(ghosttrack_app, name="ghosttrack")
app.add_typer(nanogpt_app, name="nanogpt")
app.add_typer(gradmem_app, name="gradmem")
app.add_typer(sae_app, name="sae")
app.add_typer(
    typer.Typer(no_args_is_help=True),
    name="grit",
    cls=_GritGroup,
    help="Train LoRA adapters steered by the Fisher information of their rank space.",
)


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
    """Gradients as first-class objects of the Hugging Face stack."""


if __name__ == "__main__":
    app(prog_name="hf-gradtools")
