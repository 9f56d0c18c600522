"""Where autoencoders are: a folder or a repository of the Hub, and which hookpoints it has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from hf_gradtools.hub import is_hub_id
from hf_gradtools.sae.formats import CONFIG_FILE, SCALER_FILE, SPARSIFY_WEIGHTS_FILE, WEIGHTS_FILE
from hf_gradtools.sae.formats.saelens import hookpoint_of
from hf_gradtools.sae.formats.sparsify import block_name
from hf_gradtools.sae.order import by_layer
from hf_gradtools.sae.pairs import WAITING_FILE


__all__ = ["Source", "files_below", "folders_with"]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
MAX_DEPTH = 4  # folders below the one given


@dataclass(frozen=True)
class Source:
    """A folder or a repository with autoencoders in folders.

    Args:
        origin (`str`): what the user called it.
        files (`list[str]`): all of its files, as paths with slashes.
        local (`Path`, *optional*): the folder; none if files are yet to be downloaded.
        download (`Mapping[str, Any]`): options of `snapshot_download`.
    """

    origin: str
    files: list[str]
    local: Path | None
    download: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Source:
        """Lists what is there, without downloading it.

        Raises:
            ValueError: it is neither a folder nor a Hub id.
        """
        origin = str(path_or_repo)
        if Path(path_or_repo).is_dir():
            return cls(origin, list(files_below(Path(path_or_repo))), Path(path_or_repo), {})
        if not is_hub_id(origin):
            raise ValueError(f"{origin!r} is neither a folder nor an id of the Hub, such as 'user/saes'.")
        download: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        try:
            info = HfApi(token=token).model_info(origin, revision=revision)
        except OfflineModeIsEnabled:
            # No pattern, no file that could be missing: the snapshot may hold other hookpoints than the one asked for.
            cached = Path(snapshot_download(origin, local_files_only=True, allow_patterns=[], **download))
            return cls(origin, list(files_below(cached)), cached, {})
        return cls(origin, [file.rfilename for file in info.siblings or []], None, download)

    @property
    def names(self) -> list[str]:
        """The folders that hold an autoencoder, sorted by layer; `""` is the top one."""
        return sorted(folders_with(self.files, {WEIGHTS_FILE, WAITING_FILE, SPARSIFY_WEIGHTS_FILE}), key=by_layer)

    def all(self) -> list[str]:
        """[`Source.names`], of which there is at least one."""
        if not self.names:
            raise self._missing(None)
        return self.names

    def only(self) -> str:
        """The one folder with an autoencoder."""
        names = self.all()
        if len(names) > 1:
            listed = ", ".join(repr(name) for name in names if name)
            raise ValueError(f"{self.origin} holds several SAEs. Pass hookpoint=..., one of {listed}.")
        return names[0]

    def find(self, hookpoint: str) -> str:
        """The folder of a hookpoint, also under the name that another library gives it."""
        names = self.names
        if hookpoint in names:
            return hookpoint
        fitting = [name for name in names if name and _hookpoint_of_folder(name) == hookpoint]
        if fitting or names == [""]:
            return fitting[0] if fitting else ""
        raise self._missing(hookpoint)

    def folder(self, name: str) -> Path:
        """A folder with an autoencoder on this machine; only its files are downloaded."""
        if self.local is not None:
            return self.local / name
        files = (CONFIG_FILE, WEIGHTS_FILE, SPARSIFY_WEIGHTS_FILE, SCALER_FILE)
        patterns = [str(PurePosixPath(name, file)) for file in files]
        return Path(snapshot_download(self.origin, allow_patterns=patterns, **self.download)) / name

    def _missing(self, hookpoint: str | None) -> ValueError:
        pickles = [file for file in self.files if file.endswith(PICKLES)]
        if hookpoint is not None:
            pickles = [file for file in pickles if _folder_of(file) == hookpoint or not self.names]
        if pickles:
            return ValueError(
                f"{self.origin} offers {', '.join(pickles[:4])}: a pickle can run code, and is not opened. "
                f"Convert it to {WEIGHTS_FILE} where you trust it."
            )
        there = ", ".join(repr(name) for name in self.names if name)
        return ValueError(
            f"{self.origin} holds no SAE{f' for hookpoint={hookpoint!r}' if hookpoint else ''}. "
            + (
                f"Pass one of {there}."
                if there
                else f"Need {CONFIG_FILE} and {WEIGHTS_FILE}, or <hookpoint>/ of both."
            )
        )


def files_below(folder: Path) -> Iterator[str]:
    """The files in a folder and those below it, hidden ones aside, as paths with slashes."""
    for path, folders, files in os.walk(folder):
        below = PurePosixPath(Path(path).relative_to(folder).as_posix())
        folders[:] = [name for name in folders if not name.startswith(".") and len(below.parts) < MAX_DEPTH]
        yield from (str(below / name) for name in files)


def folders_with(files: Iterable[str], weights: set[str]) -> set[str]:
    """The folders with a configuration and one of these files of weights."""
    found: dict[str, set[str]] = {}
    for file in files:
        found.setdefault(_folder_of(file), set()).add(PurePosixPath(file).name)
    return {folder for folder, names in found.items() if CONFIG_FILE in names and names & weights}


def _folder_of(file: str) -> str:
    return file.rpartition("/")[0]


def _hookpoint_of_folder(name: str) -> str | None:
    """What a folder that SAELens or sparsify named is for."""
    return hookpoint_of(block_name(PurePosixPath(name).name))
