"""The ready dataset `shakespeare_char`, made of a text in this package."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from pathlib import Path

from hf_gradtools.core.atomic import rename_unless_there
from hf_gradtools.nanogpt.data.prepare import prepare


__all__ = ["shakespeare_char"]

TEXT = Path(__file__).parent / "text" / "shakespeare.txt.gz"
NAME = "shakespeare_char"
VERSION = 1  # of the text and of how it is prepared; another one makes a folder of its own


def shakespeare_char(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of eight plays by single characters: 1.0 million for training, 0.1 million (the last) for validation.

    The first call makes it, in a second and without a network.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*): where it is kept; by default `hf_gradtools` in `HF_HOME`.

    Returns:
        `Path`: the folder, complete even if other processes ask for it at the same time.
    """
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "hf_gradtools"
    folder = Path(cache_dir) / f"{NAME}-v{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as unfinished:
            text = Path(unfinished) / "shakespeare.txt"
            with gzip.open(TEXT) as packed, open(text, "wb") as file:
                shutil.copyfileobj(packed, file)
            prepare(str(text), Path(unfinished) / NAME)
            rename_unless_there(Path(unfinished) / NAME, folder)
    return folder
