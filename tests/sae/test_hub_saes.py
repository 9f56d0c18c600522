"""Autoencoders on a Hub that listens on loopback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub_stub import HubStub


ROOT = Path(__file__).parents[2]
HEADER = """
import torch
from hf_gradtools.sae import SAE, SAEConfig, load_many
from hf_gradtools.sae.saving import push_many

def make(hookpoint, seed, **options):
    metadata = {"evaluation": {"fvu": 0.1 + seed}}
    return SAE(SAEConfig(32, 64, k=4, hookpoint=hookpoint, model_name="user/tiny", metadata=metadata), seed=seed)
"""
PUSH = """
push_many([make("layers.0", 0), make("layers.10", 1)], "user/saes")
address = make("layers.1", 2).push_to_hub("saes")
assert "/user/saes/commit/" in address, address
make("layers.0", 3).push_to_hub("user/saes")
"""
LOAD_ONE = """
sae = SAE.from_pretrained("user/saes", hookpoint="layers.1")
assert torch.equal(sae.W_dec, make("layers.1", 2).W_dec) and sae.config.metadata["evaluation"]["fvu"] == 2.1
for call, message in (
    (lambda: SAE.from_pretrained("user/saes"), "Pass hookpoint=..., one of 'layers.0', 'layers.1', 'layers.10'."),
    (lambda: SAE.from_pretrained("user/saes", hookpoint="layers.7"), "Pass one of 'layers.0', 'layers.1'"),
    (lambda: SAE.from_pretrained("user/pickled"), "offers layers.0/sae_weights.pt: a pickle can run code"),
):
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""
OFFLINE = """
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = True
assert torch.equal(SAE.from_pretrained("user/saes", hookpoint="layers.1").W_dec, sae.W_dec)
assert torch.equal(SAE.from_pretrained("user/saes").W_dec, sae.W_dec)  # the only one that there is now
"""
LOAD_MANY = """
saes = load_many("user/saes")
assert list(saes) == ["layers.0", "layers.1", "layers.10"]
assert torch.equal(saes["layers.0"].W_dec, make("layers.0", 3).W_dec)
"""


def run(hub, home, program):
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=hub.environ(home), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_model):
    with HubStub() as hub:
        hub.repos["user/tiny"] = [{path.name: path.read_bytes() for path in tiny_model.iterdir()}]
        hub.repos["user/pickled"] = [{"layers.0/cfg.json": b"{}", "layers.0/sae_weights.pt": b"no"}]
        run(hub, tmp_path_factory.mktemp("pusher"), HEADER + PUSH)
        yield hub


def test_each_push_is_one_commit_beside_the_others(hub):
    pushed = [f"layers.{i}/{name}" for i in (0, 1, 10) for name in ("cfg.json", "sae_weights.safetensors")]
    assert sorted(hub.files("user/saes")) == sorted(["README.md", *pushed])
    assert [len(files) for files in hub.repos["user/saes"]] == [0, 5, 7, 7]


def test_the_card_lists_all_that_the_repository_holds(hub):
    card = ModelCard(hub.files("user/saes")["README.md"].decode())
    rows = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert [(row.split(" | ")[0][3:-1], row.split(" | ")[4][:6]) for row in rows] == [
        ("layers.0", "3.1000"), ("layers.1", "2.1000"), ("layers.10", "1.1000")
    ]  # fmt: skip
    assert card.data.base_model == ["user/tiny"]
    assert "# saes" in card.text


def test_only_what_was_asked_for_is_downloaded_and_then_in_the_cache(hub, tmp_path):
    before = len(hub.requests)
    run(hub, tmp_path, HEADER + LOAD_ONE + OFFLINE)
    fetched = {request.split("/", 5)[-1] for request in hub.requests[before:] if "/resolve/" in request}
    assert fetched == {"layers.1/cfg.json", "layers.1/sae_weights.safetensors"}


def test_many_come_back_in_the_order_of_layers_and_the_cards_code_runs(hub, tmp_path):
    code = re.search(r"```python\n(.*?)```", hub.files("user/saes")["README.md"].decode(), re.DOTALL)[1]
    check = "assert latents.shape == (1, 3, 64) and reconstruction.shape == (1, 3, 32)"
    run(hub, tmp_path, HEADER + LOAD_MANY + code + check)
