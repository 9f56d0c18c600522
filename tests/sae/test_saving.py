"""Autoencoders saved and loaded: bit by bit, strictly, whole or not at all; cards; files of other libraries."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_gradtools.sae import SAE, SAEConfig, load_many, save_many
from hf_gradtools.sae.card import MARKER


FIXTURES = Path(__file__).parent / "fixtures"
D, F, K = 8, 32, 4
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
EVALUATION = {"fvu": 0.21894, "l0": 31.87, "dead_fraction": 0.0123, "num_tokens": 4000}


def make_sae(hookpoint="layers.5", activation="topk", seed=0, dtype=torch.float32, **options):
    sae = SAE(SAEConfig(D, F, activation, k=K, hookpoint=hookpoint, **options), seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) - (0.5 if tensor.dim() == 2 else 0))
    return sae


def assert_equal(one, other):
    assert one.config == other.config
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert tensor.dtype == other.state_dict()[name].dtype


def edit_config(folder, edit):
    cfg = json.loads((folder / "cfg.json").read_text())
    edit(cfg)
    (folder / "cfg.json").write_text(json.dumps(cfg))


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_saved_autoencoder_comes_back_bit_by_bit(activation, dtype, tmp_path):
    options = {"model_name": "user/model", "metadata": {"seed": 3, "notes": ["x"]}, "apply_b_dec_to_input": False}
    sae = make_sae(activation=activation, dtype=dtype, **options)
    assert sae.save_pretrained(tmp_path) == tmp_path / "layers.5"
    state = torch.get_rng_state()
    for loaded in (
        SAE.from_pretrained(tmp_path, hookpoint="layers.5"),
        SAE.from_pretrained(str(tmp_path)),
        SAE.from_pretrained(tmp_path / "layers.5"),
        SAE.from_pretrained(tmp_path / "layers.5", hookpoint="layers.5"),
    ):
        assert_equal(loaded, sae)
        assert not loaded.training
        assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"shared_threshold": True}, {"matryoshka_widths": (8, F)}])
def test_options_come_back(options, tmp_path):
    sae = make_sae(activation="jumprelu", **options)
    sae.save_pretrained(tmp_path)
    assert_equal(SAE.from_pretrained(tmp_path), sae)


def test_without_a_hookpoint_the_files_lie_in_the_folder_itself(tmp_path):
    sae = make_sae(hookpoint=None)
    assert sae.save_pretrained(tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert_equal(SAE.from_pretrained(tmp_path), sae)


def test_a_subclass_is_loaded_as_itself(tmp_path):
    class Mine(SAE):
        pass

    make_sae().save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine


def test_many_are_sorted_by_layer(tmp_path):
    saes = {name: make_sae(name, seed=i) for i, name in enumerate(["layers.10", "layers.2", "layers.2.mlp"])}
    assert save_many(saes, tmp_path) == tmp_path
    loaded = load_many(tmp_path)
    assert list(loaded) == ["layers.2", "layers.2.mlp", "layers.10"]
    for name, sae in loaded.items():
        assert_equal(sae, saes[name])
    assert list(load_many(tmp_path, ["layers.10", "layers.2"])) == ["layers.2", "layers.10"]


def test_the_same_autoencoder_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        make_sae().save_pretrained(tmp_path / folder)
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a/layers.5" / name).read_bytes() == (tmp_path / "b/layers.5" / name).read_bytes()


# ---- strictness


def test_which_one_must_be_said_where_there_are_several(tmp_path):
    save_many([make_sae("layers.10"), make_sae("layers.2")], tmp_path)
    with pytest.raises(ValueError, match=r"holds several SAEs. Pass hookpoint=..., one of 'layers.2', 'layers.10'."):
        SAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no SAE for hookpoint='layers.3'. Pass one of 'layers.2', 'layers.10'."):
        SAE.from_pretrained(tmp_path, hookpoint="layers.3")
    with pytest.raises(ValueError, match="holds the SAE of 'layers.2' alone, not of hookpoint='layers.3'"):
        SAE.from_pretrained(tmp_path / "layers.2", hookpoint="layers.3")
    with pytest.raises(ValueError, match=r"hookpoints='layers.2' is one text; need several. Pass \['layers.2'\]"):
        load_many(tmp_path, "layers.2")


def test_where_there_is_none_it_says_so(tmp_path):
    for call in (SAE.from_pretrained, load_many):
        with pytest.raises(ValueError, match="holds no SAE. Need cfg.json and sae_weights.safetensors"):
            call(tmp_path)
        with pytest.raises(ValueError, match="is neither a folder nor an id of the Hub"):
            call(tmp_path / "nothing" / "here")


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_weights_that_do_not_fit_are_refused(change, tmp_path):
    folder = make_sae().save_pretrained(tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    if change == "missing":
        del tensors["b_dec"]
    else:
        tensors["more" if change == "extra" else "b_dec"] = torch.zeros(3)
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="is damaged, or not the file that cfg.json beside it was saved with"):
        SAE.from_pretrained(tmp_path)
    edit_config(folder, lambda cfg: cfg["hf_gradtools"].pop("weights_sha256"))  # as the error says
    with pytest.raises(ValueError, match="b_dec" if change != "extra" else "more"):
        SAE.from_pretrained(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path):
    file = make_sae().save_pretrained(tmp_path) / "sae_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        SAE.from_pretrained(tmp_path)


def test_a_field_that_no_config_has_is_refused(tmp_path):
    folder = make_sae().save_pretrained(tmp_path)
    edit_config(folder, lambda cfg: cfg["hf_gradtools"]["config"].update(flux=1))
    with pytest.raises(ValueError, match="SAEConfig has no field flux"):
        SAE.from_pretrained(tmp_path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


@pytest.mark.parametrize("name", ["sae_weights.bin", "ae.pt", "sae_weights.safetensors"])
@pytest.mark.parametrize("hookpoint", [None, "layers.5"])
def test_a_pickle_is_refused_by_name_and_not_opened(name, hookpoint, tmp_path):
    folder = make_sae().save_pretrained(tmp_path / "saes")
    (folder / "sae_weights.safetensors").unlink()
    edit_config(folder, lambda cfg: cfg["hf_gradtools"].pop("weights_sha256"))
    torch.save(Trap(tmp_path / "sprung"), folder / name)
    with pytest.raises(ValueError, match=name):
        SAE.from_pretrained(tmp_path / "saes", hookpoint=hookpoint)
    assert not (tmp_path / "sprung").exists()


def test_hookpoints_cannot_leave_the_folder(tmp_path):
    for hookpoint in ("../x", "/tmp/x", "a/../../b", "a\\b"):
        with pytest.raises(ValueError, match="is no name for a folder"):
            make_sae(hookpoint).save_pretrained(tmp_path / "saes")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_leaves_what_was_there(tmp_path):
    sae = make_sae(seed=1)
    sae.save_pretrained(tmp_path)
    bad = make_sae(seed=2, metadata={"loss": torch.zeros(())})
    with pytest.raises(ValueError, match=r"sae.config is not fit for JSON.*Keep numbers and texts in metadata"):
        bad.save_pretrained(tmp_path)
    assert_equal(SAE.from_pretrained(tmp_path), sae)


def test_lists_that_cannot_be_saved_are_named(tmp_path):
    for saes, message in (
        ([], "saes is empty"),
        ([make_sae(), make_sae()], r"hookpoints \['layers.5', 'layers.5'\]; need a different one each"),
        ([make_sae(), make_sae(None)], "need a different one each"),
    ):
        with pytest.raises(ValueError, match=message):
            save_many(saes, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- kills


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("first", [True, False])
def test_a_killed_save_leaves_the_old_pair_or_the_new(first, step, when, tmp_path, monkeypatch):
    old, new, third = make_sae(seed=1), make_sae(seed=2, auxk=5), make_sae(seed=3)
    if not first:
        old.save_pretrained(tmp_path / "saes")
    replace, calls = os.replace, []

    def killed_replace(*paths):
        calls.append(paths)
        if len(calls) == step + 1 and when == "before":
            raise KeyboardInterrupt
        replace(*paths)
        if len(calls) == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed_replace)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path / "saes")
    monkeypatch.undo()
    committed = step > 1 or (step == 1 and when == "after")
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "saes/layers.5", left)
    if committed or not first:
        assert_equal(SAE.from_pretrained(left), new if committed else old)
    else:
        with pytest.raises(ValueError, match="holds no SAE"):
            SAE.from_pretrained(left)
    third.save_pretrained(tmp_path / "saes")
    assert_equal(SAE.from_pretrained(tmp_path / "saes"), third)
    assert sorted(path.name for path in (tmp_path / "saes/layers.5").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_two_kills_in_a_row_lose_nothing_that_was_committed(tmp_path, monkeypatch):
    make_sae(seed=1).save_pretrained(tmp_path)
    replace, committed = os.replace, make_sae(seed=2)

    def killed_at(name):
        def killed_replace(source, target):
            replace(source, target)
            if Path(target).name == name:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", killed_replace)

    killed_at("cfg.json")
    with pytest.raises(KeyboardInterrupt):
        committed.save_pretrained(tmp_path)
    killed_at("sae_weights.safetensors.next")
    with pytest.raises(KeyboardInterrupt):
        make_sae(seed=3).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert_equal(SAE.from_pretrained(tmp_path), committed)


# ---- cards


def test_the_card_has_every_hookpoints_own_figures(tmp_path):
    evaluation = {**EVALUATION, "cross_entropy": {"recovered": 0.98765, "model": 3.0}}
    metadata = {"evaluation": evaluation, "training": {"tokens": 280000}}
    make_sae("layers.10", model_name="user/model", metadata=metadata).save_pretrained(tmp_path / "saes")
    make_sae("layers.2", "gated", model_name=str(tmp_path), metadata={"evaluation": {"fvu": 0.5}}).save_pretrained(
        tmp_path / "saes"
    )
    card = ModelCard.load(tmp_path / "saes" / "README.md")
    rows = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `layers.2` | gated | 8 | 32 |  | 0.5000 |  |  |  |  |",
        "| `layers.10` | topk, k = 4 | 8 | 32 | 280,000 tokens | 0.2189 | 31.9 | 1.23% | 98.77% | 4,000 |",
    ]
    assert card.data.library_name == "hf_gradtools"
    assert "sparse-autoencoder" in card.data.tags
    assert card.data.base_model == ["user/model"]
    assert str(tmp_path) not in card.content
    assert not re.search(r"\n\n\n|[ \t]\n", card.text)


def test_a_card_without_figures_claims_none(tmp_path):
    make_sae(model_name=str(tmp_path)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "FVU" not in card.text
    assert card.data.base_model is None


def test_somebodys_own_card_stays(tmp_path):
    make_sae("layers.1").save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    make_sae("layers.2").save_pretrained(tmp_path)
    assert "layers.2" in readme.read_text()
    readme.write_text(readme.read_text().replace(MARKER, "my words"))
    make_sae("layers.3").save_pretrained(tmp_path)
    assert "my words" in readme.read_text()
    assert "layers.3" not in readme.read_text()


def test_the_cards_code_runs(tmp_path, monkeypatch):
    make_sae().save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "mine/README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["latents"].shape == (1, 10, F)
    assert names["reconstruction"].shape == (1, 10, D)


# ---- other libraries


@pytest.mark.parametrize("folder", sorted(path.parent for path in FIXTURES.glob("*/*/cfg.json")), ids=lambda f: f.name)
def test_files_of_other_libraries_load(folder):
    sae = SAE.from_pretrained(folder)
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = sae.float()(expected["inputs"])
    torch.testing.assert_close(output.latents.dense(), expected["latents"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.reconstruction, expected["reconstruction"], atol=1e-5, rtol=1e-5)
    assert sae.config.hookpoint == {"h.3": "layers.3"}.get(folder.name, "layers.5")


def test_folders_that_other_libraries_named_are_found_by_hookpoint(tmp_path):
    shutil.copytree(FIXTURES / "sparsify", tmp_path / "sparsify")
    assert list(load_many(tmp_path / "sparsify")) == ["layers.3", "layers.5"]
    assert SAE.from_pretrained(tmp_path / "sparsify", hookpoint="layers.3").config.hookpoint == "layers.3"
    shutil.copytree(FIXTURES / "saelens" / "topk", tmp_path / "lens" / "blocks.5.hook_resid_post")
    for hookpoint in ("layers.5", "blocks.5.hook_resid_post"):
        assert SAE.from_pretrained(tmp_path / "lens", hookpoint=hookpoint).config.hookpoint == "layers.5"


def test_several_of_one_hookpoint_must_be_chosen_by_folder(tmp_path):
    for name in ("topk", "gated"):
        shutil.copytree(FIXTURES / "saelens" / name, tmp_path / name)
    with pytest.raises(ValueError, match="holds several SAEs of 'layers.5'"):
        load_many(tmp_path)
    assert SAE.from_pretrained(tmp_path, hookpoint="gated").config.activation == "gated"
