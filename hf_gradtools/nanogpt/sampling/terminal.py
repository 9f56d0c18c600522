"""From the words of a command line to its options, and from errors to one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from hf_gradtools.workflow.terminal import one_line_errors, quiet


__all__ = ["command_line", "plain_console"]

FILE_WIDTH = 1000  # columns, where tables go to a file or a pipe


def plain_console() -> Console:
    """Prints to the terminal what it is given, and reads nothing into it: no markup, no highlights, no emoji."""
    width = None if sys.stdout.isatty() else FILE_WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def command_line(options: type, argv: list[str] | None, prog: str, description: str) -> Iterator[Any]:
    """Yields the options that `argv` asks for; what is wrong with them, or goes wrong, ends the process in one line.

    Args:
        options (`type`): dataclass whose fields are the flags.
        argv (`list[str]`, *optional*): the words after the command; default the process's own.
        prog (`str`): the command, in its help.
        description (`str`): what it does.
    """
    try:
        with one_line_errors(options):
            from hf_gradtools.workflow.flags import parser_for

            parser = parser_for(options, prog=prog, description=description)
            (parsed,) = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
            quiet()
            yield parsed
    except typer.Exit as ended:  # outside of a typer app, as in an example, nothing else would catch it
        raise SystemExit(ended.exit_code) from ended
