"""Rows in the terminal and in files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_gradtools.core.atomic import atomic_write
from hf_gradtools.nanogpt.analysis.plots import show_cell


__all__ = ["check_ending", "print_rows", "write_rows"]

ENDINGS = (".csv", ".json")


def check_ending(path: str | os.PathLike[str] | None, name: str, endings: Sequence[str] = ENDINGS) -> None:
    """ValueError if a file that is to be written has another ending; told before any work is done."""
    if path is not None and Path(path).suffix not in endings:
        raise ValueError(f"{name}={str(path)!r} must end in {' or '.join(endings)}.")


def write_rows(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows of the same fields as `.csv` or `.json`, whole or not at all; what is not known is empty or null.

    Raises:
        ValueError: the ending is another.
    """
    check_ending(path, "output")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps([{name: _finite(value) for name, value in row.items()} for row in rows], indent=2) + "\n"
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Prints rows of the same fields as a table; columns that are empty in all rows are left out."""
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] not in (None, "") for row in rows)]
    table = Table(title=None if title is None else Text(title, "bold"))
    for name in columns:
        is_text = any(isinstance(row[name], str) for row in rows)
        table.add_column(Text(name), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(show_cell(row[name])) for name in columns))
    console.print(table)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
