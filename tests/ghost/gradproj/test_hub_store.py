"""A store's way to the Hub and back, through a stand-in on loopback; its card; its copies."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard

from hf_gradtools.ghost.gradproj.store import GradientStore, GradientWriter
from tests.hub_stub import HubStub, _Handler


ROOT = Path(__file__).parents[3]
IDENTITY = {"model_class": "GPT2", "layers": ["a", "b"], "seed": 0, "basis": "orthonormal", "weights": "0f" * 80}


class _DatasetHandler(_Handler):
    """The stand-in knows models; datasets have the same API under another name."""

    def dispatch(self):
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/user/", "/user/")
        self._dispatch()

    do_GET = do_HEAD = do_POST = do_PUT = dispatch  # noqa: N815 - http.server's names


class DatasetHub(HubStub):
    def __init__(self):
        super().__init__()
        self._server.RequestHandlerClass = type("BoundHandler", (_DatasetHandler,), {"hub": self})


def gradients(rows=40):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))


def write(path, rows=40, finish=True, **options):
    options = {"dim": 6, "dtype": "float32", "rows_per_shard": 16, "extra": {"model": "user/model"}, **options}
    with GradientWriter(path, IDENTITY, **options) as writer:
        for first in range(0, rows, 8):
            ids = list(range(first, min(first + 8, rows)))
            writer.append({"sample_id": ids, "gradient": gradients(rows)[ids]})
        if finish:
            writer.finish()
    return GradientStore.open(path)


def push(folder):
    """Runs in a process of its own, once with more shards than afterwards."""
    for rows in (40, 20):
        store = write(Path(folder) / str(rows), rows)
        store.search(torch.ones(6), 3, precondition="fisher")
        store.push_to_hub("user/store", license="mit")


def load(folder):
    """Runs in another process: what was pushed comes back."""
    store = GradientStore.from_pretrained("user/store")
    assert store.complete
    assert store.verify().rows == 20
    assert torch.equal(store.rows(range(20)), gradients(20))
    store.search(torch.ones(6), 3, precondition="fisher")  # in the cache, whose files must not change
    store.verify()


def test_a_pushed_store_comes_back_whole(tmp_path):
    with DatasetHub() as hub:
        for function in ("push", "load"):
            command = f"from {Path(__file__).stem} import {function}; {function}({str(tmp_path)!r})"
            path = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]; "
            environ = hub.environ(tmp_path / f"home-{function}")
            result = subprocess.run(
                [sys.executable, "-c", path + command], env=environ, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, result.stderr
        files = hub.files("user/store")
    shards = ["shard-00000-00000.arrow", "shard-00000-00000.sha256", "shard-00000-00001.arrow"]
    assert sorted(files) == ["README.md", "manifest.json", *shards, "shard-00000-00001.sha256"]
    card = files["README.md"].decode()
    assert "license: mit" in card
    assert 'from_pretrained("user/store")' in card
    assert str(tmp_path) not in card


def test_the_card_has_the_stores_own_numbers_and_no_folder(tmp_path):
    store = write(tmp_path / "store", extra={"model": str(tmp_path / "mine")})
    store.save_pretrained(tmp_path / "copy", tags=["law"])
    card = DatasetCard.load(tmp_path / "copy" / "README.md")
    assert "| samples | 40 |" in card.text
    assert "| numbers per sample | 6 × float32 |" in card.text
    assert f"{store.info()['bytes_per_sample']:,.0f} bytes per sample" in card.text
    assert "| `basis` | `orthonormal` |" in card.text
    assert "`mine`" in card.text
    assert str(tmp_path) not in str(card)
    assert "0f0f" not in card.text
    assert card.data.size_categories == ["n<1K"]
    assert {"law", "gradients"} <= set(card.data.tags)
    assert not re.search(r"\n\n\n|[ \t]\n", card.text)


def test_a_saved_copy_is_the_same_store_without_what_is_derived(tmp_path):
    store = write(tmp_path / "store")
    store.search(torch.ones(6), 3, precondition="fisher")
    store.save_pretrained(tmp_path / "copy")
    copy = GradientStore.from_pretrained(tmp_path / "copy")
    assert copy.verify().rows == 40
    assert torch.equal(copy.rows(range(40)), gradients())
    assert not (tmp_path / "copy" / "fisher.safetensors").exists()
    with pytest.raises(ValueError, match="holds a store already"):
        store.save_pretrained(tmp_path / "copy")


def test_rows_in_progress_are_not_copied_or_pushed(tmp_path):
    store = write(tmp_path / "store", finish=False)
    for spread in (lambda: store.save_pretrained(tmp_path / "copy"), lambda: store.push_to_hub("user/store")):
        with pytest.raises(ValueError, match="still in progress"):
            spread()


def test_what_is_neither_folder_nor_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder nor an id of the Hub"):
        GradientStore.from_pretrained(tmp_path / "nothing" / "here")


def test_datasets_opens_the_shards_of_a_saved_store(tmp_path, datasets_cache):
    from datasets import load_dataset

    write(tmp_path / "store").save_pretrained(tmp_path / "copy")
    dataset = load_dataset(str(tmp_path / "copy"), split="train")
    assert dataset["sample_id"][:] == list(range(40))
    assert json.loads((tmp_path / "copy" / "manifest.json").read_text())["complete"]
