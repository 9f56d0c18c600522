"""The dataset card of stored gradients, and their way to the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from hf_gradtools import __version__
from hf_gradtools.core.shards import SHARD_NAME
from hf_gradtools.hub import CARD_FILE, is_hub_id, write_card


if TYPE_CHECKING:
    from .store import GradientStore

TEMPLATE = "gradient_store_card.md"
TAGS = ["hf_gradtools", "gradients", "data-attribution"]
SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]


def write_store_card(
    folder: str | os.PathLike[str], store: GradientStore, repo_id: str | None = None, **metadata: Any
) -> DatasetCard:
    """Writes `README.md` with the store's own numbers; folders of this machine are not named.

    Args:
        folder: where to.
        store: that it describes.
        repo_id: on the Hub.
        **metadata: of [`~huggingface_hub.DatasetCardData`], such as `license`; `tags` are added to ours.
    """
    info = store.info()
    tags = [*TAGS, *(metadata.pop("tags", None) or [])]
    size = next((name for limit, name in SIZES if info["rows"] < limit), "n>10M")
    data = DatasetCardData(
        tags=tags,
        size_categories=[size],
        configs=[{"config_name": "default", "data_files": "shard-*.arrow"}],
        **metadata,
    )
    model = info["model"]
    write_card(
        folder,
        TEMPLATE,
        data,
        dim=info["dim"],
        title=(repo_id or Path(folder).absolute().name).split("/")[-1],
        repo_id=repo_id or "user/gradients",
        model=f"[`{model}`](https://huggingface.co/{model})" if is_hub_id(model) else f"`{Path(str(model)).name}`",
        has_model=bool(model),
        figures=_figures(info),
        projection=[(key, _text(value)) for key, value in info["projection"].items() if _is_short(value)],
        columns=info["columns"],
        version=info["extra"].get("library_version", __version__),
    )
    return DatasetCard.load(Path(folder) / CARD_FILE)


def push_store(
    store: GradientStore,
    files: list[Path],
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    metadata: dict[str, Any],
) -> str:
    """Uploads the files and a card in one commit; returns its address."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        card = str(write_store_card(folder, store, repo_id, **metadata)).encode()
    added = {file.name: CommitOperationAdd(file.name, str(file)) for file in files}
    added[CARD_FILE] = CommitOperationAdd(CARD_FILE, card)
    old = [name for name in api.list_repo_files(repo_id, repo_type="dataset", revision=revision) if _is_shard(name)]
    removed = [CommitOperationDelete(name) for name in old if name not in added]
    commit = api.create_commit(
        repo_id, [*removed, *added.values()], commit_message=commit_message, repo_type="dataset", revision=revision,
        create_pr=create_pr,
    )  # fmt: skip
    return str(commit.commit_url)


def _is_shard(name: str) -> bool:
    return SHARD_NAME.fullmatch(name.replace(".sha256", ".arrow")) is not None


def _figures(info: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("samples", f"{info['rows']:,}" + ("" if info["complete"] else " (incomplete)")),
        ("numbers per sample", f"{info['dim']:,} × {info['dtype']}"),
        ("size", f"{info['bytes'] / 1e6:,.1f} MB, {info['bytes_per_sample']:,.0f} bytes per sample"),
        ("shards", str(info["shards"])),
        *([("layers", str(info["layers"]))] if isinstance(info["layers"], int) else []),
    ]


def _is_short(value: Any) -> bool:
    """What a table can hold; a string with separators may be a folder."""
    if isinstance(value, str):
        return len(value) < 80 and (not os.path.isabs(value)) and not os.path.exists(value)
    scalars = (str, int, float, bool)
    return isinstance(value, scalars) or (isinstance(value, list) and len(value) <= 4 and all(map(_is_short, value)))


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "`" + " ".join(text.replace("|", "\\|").split()) + "`"
