"""Autoencoders trained by two gloo processes, each batch shared out or the layers, against one process."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from hf_gradtools.sae import load_many
from tests.distributed.run_sae import CONFIGS, trainer
from tests.distributed.test_distributed import torchrun


pytestmark = pytest.mark.distributed
NAMES = list(CONFIGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of the ranks' results, with what one process does in `alone`."""
    path = tmp_path_factory.mktemp("saes")
    trainer(path / "alone" / "saes", "layers").train()
    torchrun("tests.distributed.run_sae", path)
    return path


@pytest.fixture(scope="module")
def ranks(run):
    return [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_shared_batches_train_as_one_process_does(run):
    ours, alone = load_many(run / "data"), load_many(run / "alone" / "saes")
    assert list(ours) == list(alone) == NAMES
    for name, sae in ours.items():
        for key, expected in alone[name].state_dict().items():
            torch.testing.assert_close(sae.state_dict()[key], expected, atol=1e-6, rtol=1e-5, msg=f"{name} {key}")


def test_shared_layers_train_exactly_as_one_process_does(run):
    for name in NAMES:
        for file in ("cfg.json", "sae_weights.safetensors"):
            ours, alone = run / "layers" / name / file, run / "alone" / "saes" / name / file
            assert ours.read_bytes() == alone.read_bytes(), (name, file)
    card = (run / "layers" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in NAMES)


def test_each_file_is_written_once(ranks, run):
    times = Counter(file for rank in ranks for file in rank["written"] if "README" not in file)
    assert times
    assert set(times.values()) == {1}
    for kind in ("data", "layers"):
        assert times.keys() >= {f"{kind}/{name}/cfg.json" for name in NAMES}
    steps = [file for rank in ranks for file in rank["written"] if "/step-" in file]
    assert len(steps) == 2 * 3 * 2
    assert not list(run.rglob("step-*"))


def test_every_rank_has_what_it_trained(ranks):
    assert [rank["ranks"] for rank in ranks] == [2, 2]
    assert [rank["hookpoints"]["layers"] for rank in ranks] == [["layers.0", "layers.2"], ["layers.1"]]
    assert [rank["loaded"]["layers"] for rank in ranks] == [["layers.0", "layers.2"], ["layers.1"]]
    assert [rank["loaded"]["data"] for rank in ranks] == [NAMES, NAMES]
    assert [rank["steps_again"] for rank in ranks] == [0, 0]
