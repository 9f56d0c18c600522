"""Autoencoders saved, loaded and pushed: a folder for each hookpoint, and one card above them."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download

from hf_gradtools.hub import CARD_FILE, ensure_repo, push_folder
from hf_gradtools.sae.card import is_ours, write_sae_card
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.formats import CONFIG_FILE, SPARSIFY_WEIGHTS_FILE, WEIGHTS_FILE, read_folder
from hf_gradtools.sae.modeling_sae import SAE
from hf_gradtools.sae.order import by_layer
from hf_gradtools.sae.pairs import check_pair, our_block, write_pair
from hf_gradtools.sae.sources import Source, files_below, folders_with


__all__ = ["load", "load_many", "push_many", "refresh_card", "save", "save_many", "write_pairs"]

logger = logging.getLogger(__name__)

AnySAE = TypeVar("AnySAE", bound=SAE)


# ---- to disk


def save(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Writes one autoencoder, and the card of `folder` if it has a hookpoint; see [`SAE.save_pretrained`].

    Raises:
        ValueError: its hookpoint is no name for a folder, or it cannot be written; nothing is then.
    """
    target = _folder_for(sae, Path(folder))
    write_pair(sae, target)
    if sae.config.hookpoint:
        refresh_card(Path(folder))
    return target


def save_many(saes: Mapping[str, SAE] | Iterable[SAE], folder: str | os.PathLike[str]) -> Path:
    """Writes several autoencoders, each to the folder of its hookpoint, and one card.

    Args:
        saes (`Mapping[str, SAE]` or `Iterable[SAE]`): with a hookpoint each, unless it is one alone.
        folder (`str` or `os.PathLike`): made if missing; other hookpoints in it stay.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: there is none, two have the same hookpoint, or one has none.
    """
    write_pairs(_distinct(saes), Path(folder))
    refresh_card(Path(folder))
    return Path(folder)


def _distinct(saes: Mapping[str, SAE] | Iterable[SAE]) -> list[SAE]:
    saes = list(saes.values() if isinstance(saes, Mapping) else saes)
    hookpoints = [sae.config.hookpoint for sae in saes]
    if not saes:
        raise ValueError("saes is empty; need at least one SAE. Pass [sae].")
    if len(set(hookpoints)) < len(saes) or (len(saes) > 1 and None in hookpoints):
        raise ValueError(
            f"saes have the hookpoints {hookpoints}; need a different one each. Set sae.config.hookpoint."
        )
    return saes


def write_pairs(saes: list[SAE], top: Path) -> None:
    """Writes each autoencoder to the folder of its hookpoint below `top`, and leaves the card as it is."""
    for sae, folder in [(sae, _folder_for(sae, top)) for sae in saes]:
        write_pair(sae, folder)


def _folder_for(sae: SAE, top: Path) -> Path:
    hookpoint = sae.config.hookpoint
    if not hookpoint:
        return top
    parts = PurePosixPath(hookpoint).parts
    if hookpoint.startswith("/") or ".." in parts or "\\" in hookpoint or not parts:
        raise ValueError(f"hookpoint={hookpoint!r} is no name for a folder. Set sae.config.hookpoint='layers.5'.")
    return top.joinpath(*parts)


def refresh_card(top: Path, repo_id: str | None = None, others: Mapping[str, SAEConfig] | None = None) -> None:
    """Writes the card of all autoencoders in a folder, unless somebody made it their own."""
    if is_ours(top):
        configs = {**(others or {}), **_configs(top, {WEIGHTS_FILE})}
        write_sae_card(top, {name: configs[name] for name in sorted(configs, key=by_layer)}, repo_id)


def _configs(top: Path, weights: set[str]) -> dict[str, SAEConfig]:
    """The configurations that we wrote in folders that have such a file too; other libraries' have none."""
    configs = {}
    for name in folders_with(files_below(top), weights):
        if block := our_block(top / name / CONFIG_FILE):
            try:
                configs[name] = SAEConfig.from_dict(block.get("config", {}))
            except (TypeError, ValueError) as error:
                logger.warning("%s is left out of the card: %s", top / name, error)
    return configs


# ---- from disk and the Hub


def load(
    cls: type[AnySAE], path_or_repo: str | os.PathLike[str], hookpoint: str | None = None, **download: Any
) -> AnySAE:
    """Loads one autoencoder; see [`SAE.from_pretrained`]."""
    source = Source.open(path_or_repo, **download)
    return _read(cls, source, source.only() if hookpoint is None else source.find(hookpoint), hookpoint)


def load_many(
    path_or_repo: str | os.PathLike[str], hookpoints: Iterable[str] | None = None, **download: Any
) -> dict[str, SAE]:
    """Loads several autoencoders, in evaluation mode.

    Args:
        path_or_repo (`str` or `os.PathLike`): a folder, or a Hub id.
        hookpoints (`Iterable[str]`, *optional*): which; all by default. Only their files are downloaded.
        **download: `revision`, `token`, `cache_dir`.

    Returns:
        `dict[str, SAE]`: by hookpoint, sorted by layer.

    Raises:
        ValueError: one is not there, or its weights are missing, left over or of the wrong shape.
    """
    if isinstance(hookpoints, str):
        raise ValueError(f"hookpoints={hookpoints!r} is one text; need several. Pass [{hookpoints!r}].")
    source = Source.open(path_or_repo, **download)
    wanted: Mapping[str, str | None] = dict.fromkeys(source.all())
    if hookpoints is not None:
        wanted = {source.find(hookpoint): hookpoint for hookpoint in hookpoints}
    saes: dict[str, SAE] = {}
    for name, hookpoint in wanted.items():
        sae = _read(SAE, source, name, hookpoint)
        key = sae.config.hookpoint or name
        if key in saes:
            raise ValueError(
                f"{source.origin} holds several SAEs of {key!r}. Pass hookpoints=[...], of {source.names}."
            )
        saes[key] = sae
    return {key: saes[key] for key in sorted(saes, key=by_layer)}


def _read(cls: type[AnySAE], source: Source, name: str, hookpoint: str | None) -> AnySAE:
    folder = source.folder(name)
    check_pair(folder)
    # Of a sparsify SAE only its folder's name tells where it belongs, and a downloaded repository's tells nothing.
    of_sparsify = (folder / SPARSIFY_WEIGHTS_FILE).exists() and not (folder / WEIGHTS_FILE).exists()
    fields, state = read_folder(folder, hookpoint=(name or hookpoint) if of_sparsify else hookpoint)
    if of_sparsify and not name and source.local is None:
        fields["hookpoint"] = hookpoint
    if not name and hookpoint not in (None, fields.get("hookpoint")):
        raise ValueError(
            f"{source.origin} holds the SAE of {fields.get('hookpoint')!r} alone, not of hookpoint={hookpoint!r}. "
            "Pass another folder, or leave hookpoint out."
        )
    with torch.device("meta"):  # neither time nor random numbers for weights that are replaced
        sae = cls(SAEConfig.from_dict(fields))
    sae.load_state_dict(state, strict=True, assign=True)
    return sae.eval()


# ---- to the Hub


def push_many(
    saes: Mapping[str, SAE] | Iterable[SAE],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload sparse autoencoders",
) -> str:
    """Uploads autoencoders in one commit, beside those of other hookpoints, with a card of all of them.

    Args:
        saes (`Mapping[str, SAE]` or `Iterable[SAE]`): with a hookpoint each, unless it is one alone.
        repo_id (`str`): on the Hub; made if absent.
        private (`bool`, *optional*): whether a new one is private.
        token, revision, commit_message: as for [`~hf_gradtools.hub.push_folder`].

    Returns:
        `str`: the commit's address.

    Raises:
        ValueError: as for [`save_many`].
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as there:
        write_pairs(_distinct(saes), Path(folder))
        repo_id = ensure_repo(repo_id, private=private, token=token)
        known = [f"*{CONFIG_FILE}", CARD_FILE]
        snapshot_download(repo_id, revision=revision, token=token, allow_patterns=known, local_dir=there)
        if is_ours(there):
            refresh_card(Path(folder), repo_id, _configs(Path(there), {CONFIG_FILE}))
        return push_folder(folder, repo_id, token=token, revision=revision, commit_message=commit_message)
