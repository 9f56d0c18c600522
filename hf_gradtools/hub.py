"""Cards of what is pushed to the Hub, rendered from `templates/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_gradtools.core.store import atomic_write


CARD_FILE = "README.md"
TEMPLATES = Path(__file__).parent / "templates"


def write_card(folder: str | os.PathLike[str], template_name: str, data: ModelCardData, **values: Any) -> ModelCard:
    """Renders a template of this package to `README.md`, which appears whole or not at all.

    Args:
        folder: where to write; made if absent.
        template_name: file in `templates/`, a jinja2 template that prints `card_data` between its `---` lines.
        data: the metadata.
        **values: what the template fills in.

    Returns:
        the card, so that `write_card(...).push_to_hub("user/model")` sends it alone.

    Raises:
        ValueError: there is no such template.
    """
    source = TEMPLATES / template_name
    if not source.is_file():
        known = ", ".join(sorted(file.name for file in TEMPLATES.glob("*.md")))
        raise ValueError(f"template_name={template_name!r} is unknown. Pass one of {known}.")
    card = ModelCard.from_template(data, template_path=str(source), **values)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CARD_FILE) as file:
        file.write(str(card).encode())
    return card


def is_hub_id(name: str | None) -> bool:
    """Whether a model's name can be one of the Hub: its metadata must not hold folders of this machine."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
