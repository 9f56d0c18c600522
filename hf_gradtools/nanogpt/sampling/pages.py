"""Pages in one file, of the templates of this area; they escape all that they are given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_gradtools.core.atomic import atomic_write


__all__ = ["write_page"]

TEMPLATES = Path(__file__).parents[1] / "templates"


def write_page(template: str, path: str | os.PathLike[str], **values: Any) -> Path:
    """Writes a page that needs no other file, whole or not at all.

    Args:
        template (`str`): file in `templates/`.
        path (`str`): the page; its folder is made if it is not there.
        **values: what the template shows.

    Returns:
        `Path`: the page.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        newline_sequence="\n",
        keep_trailing_newline=True,
    )
    page = environment.get_template(template).render(**values)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path
