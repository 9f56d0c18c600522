"""The way to the Hub: cards rendered from `templates/`, and uploads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
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


def ensure_repo(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, repo_type: str = "model"
) -> str:
    """Makes a repository unless it is there.

    Args:
        repo_id: `"user/name"`, or a name alone for one's own.
        private: whether a new one is private.
        token: of the Hub.
        repo_type: `"model"`, `"dataset"` or `"space"`.

    Returns:
        its id with the owner.
    """
    return HfApi(token=token).create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload folder",
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Uploads all files of a folder in one commit, beside those that the repository has.

    Args:
        folder: what to upload.
        repo_id: made if absent.
        private, token, repo_type: as for [`ensure_repo`].
        revision, commit_message, create_pr: as for `HfApi.upload_folder`.

    Returns:
        the commit's address.
    """
    repo_id = ensure_repo(repo_id, private=private, token=token, repo_type=repo_type)
    commit = HfApi(token=token).upload_folder(
        repo_id=repo_id, folder_path=folder, repo_type=repo_type, revision=revision, commit_message=commit_message,
        create_pr=create_pr,
    )  # fmt: skip
    return str(commit.commit_url)
