"""GRIT as a PEFT method: everything a LoRA adapter can do, on three shapes of models, in fresh processes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model

from hf_gradtools import GritConfig, GritModel, export_lora
from tests.grit.reference import adapted, base_model, gap


KINDS = ["llama", "gpt2", "t5"]
IDS = torch.arange(2, 14).view(2, 6)


@torch.no_grad()
def logits(model):
    model.eval()
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **extra).logits


def cut_adapter(kind, **options):
    """An adapter whose layers have several ranks."""
    model = adapted(kind, **options)
    for i, layer in enumerate(model.base_model.layers()):
        rank = 2 + i % 4
        model.base_model.resize(layer, layer.A.detach()[:rank], layer.B.detach()[:, :rank])
    return model


def in_fresh_process(tmp_path, code, *, isolated_from_us=False):
    """Runs code after `import hf_gradtools`, or where that package cannot be imported."""
    first = "import sys; sys.modules['hf_gradtools'] = None" if isolated_from_us else "import hf_gradtools"
    script = tmp_path / "fresh.py"
    script.write_text(f"{first}\nimport torch\n{code}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LOAD = """
from transformers import {auto}
ids = torch.arange(2, 14).view(2, 6)
extra = {{"decoder_input_ids": ids}} if {seq2seq} else {{}}
def values(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids, **extra).logits
base = lambda: {auto}.from_pretrained("base")
saved = torch.load("logits.pt", weights_only=True)
check = lambda model: print(float((values(model) - saved["adapted"]).abs().max() / saved["adapted"].abs().max()))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_a_fresh_process(kind, tmp_path):
    base = base_model(kind)
    base.save_pretrained(tmp_path / "base")
    model = cut_adapter(kind, base=base)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "adapter")
    model.export_lora(tmp_path / "lora")
    torch.save({"adapted": logits(model), "base": logits(base_model(kind))}, tmp_path / "logits.pt")
    auto = "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM"
    code = LOAD.format(auto=auto, seq2seq=kind == "t5")
    output = in_fresh_process(
        tmp_path,
        code
        + f"""
from peft import AutoPeftModel, {auto.replace("Auto", "AutoPeft")} as AutoPeft, PeftModel, PeftConfig, get_peft_model
from hf_gradtools import GritConfig
assert type(PeftConfig.from_pretrained("adapter")) is GritConfig
model = PeftModel.from_pretrained(base(), "adapter")
check(model)
with model.disable_adapter():
    assert torch.equal(values(model), saved["base"])
model.load_adapter("adapter", "second")
model.set_adapter("second"); check(model)
model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="cat")
model.set_adapter("mean"); check(model)
model.delete_adapter("default"); model.delete_adapter("mean"); model.set_adapter("second"); check(model)
model.merge_adapter(); check(model); model.unmerge_adapter(); check(model)
model.add_adapter("new", GritConfig(r=3, min_lora_rank=1, target_modules="all-linear"))
model.set_adapter("second"); check(model)
check(AutoPeft.from_pretrained("adapter"))
plain = base(); plain.load_adapter("adapter"); check(plain)
check(model.merge_and_unload())
""",
    )
    errors = [float(line) for line in output.split()]
    assert len(errors) == 10
    assert max(errors) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_exported_adapter_needs_only_peft(kind, options, tmp_path):
    base = base_model(kind)
    base.save_pretrained(tmp_path / "base")
    model = cut_adapter(kind, base=base, **options)
    model.save_pretrained(tmp_path / "adapter")
    model.export_lora(tmp_path / "lora")
    export_lora(tmp_path / "adapter", tmp_path / "lora2")  # from the saved adapter, without its base model
    torch.save({"adapted": logits(model)}, tmp_path / "logits.pt")
    auto = "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM"
    code = LOAD.format(auto=auto, seq2seq=kind == "t5") + (
        "from peft import PeftModel, LoraConfig, PeftConfig\n"
        "for folder in ('lora', 'lora2'):\n"
        "    assert type(PeftConfig.from_pretrained(folder)) is LoraConfig\n"
        "    model = PeftModel.from_pretrained(base(), folder)\n"
        "    check(model); check(model.merge_and_unload())\n"
        "try:\n    PeftModel.from_pretrained(base(), 'adapter')\n"
        "except KeyError as error:\n    print('KeyError', error)\n"
    )
    *errors, last = in_fresh_process(tmp_path, code, isolated_from_us=True).strip().split("\n")
    assert last == "KeyError 'GRIT'"  # what PEFT says of a method that it does not know
    assert max(map(float, errors)) < 1e-5


def test_dora_and_modules_to_save_reload(tmp_path):
    model = cut_adapter("llama", use_dora=True, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    assert gap(logits(again), logits(model)) < 1e-6
    model.export_lora(tmp_path / "lora")
    assert gap(logits(PeftModel.from_pretrained(base_model(), tmp_path / "lora")), logits(model)) < 1e-6


def test_patterns_and_single_targets(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5})
    assert set(model.base_model.ranks().values()) == {6, 3}
    before = {layer.name: layer.module.scaling["default"] for layer in model.base_model.layers()}
    for layer in model.base_model.layers():
        model.base_model.resize(layer, layer.A.detach()[:2], layer.B.detach()[:, :2])
    assert {layer.name: layer.module.scaling["default"] for layer in model.base_model.layers()} == before
    report = model.base_model.rank_report()
    assert {row["base_rank"] for row in report["layers"].values()} == {6, 3}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.base_model.rank_report() == report


def test_loading_into_an_adapter_of_full_rank(tmp_path):
    """What a Trainer does when it resumes."""
    model = cut_adapter("llama", use_rslora=True)
    model.save_pretrained(tmp_path)
    fresh = adapted(use_rslora=True, trained=False)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert fresh.base_model.ranks() == model.base_model.ranks()
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_adapter_of_another_base_is_named(tmp_path):
    cut_adapter("llama").save_pretrained(tmp_path)
    wider = base_model(hidden_size=32)
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(wider, tmp_path)


def test_plain_lora_is_not_disturbed(tmp_path):
    """Registering GRIT changes nothing for others; and the two do not mix on one model, as PEFT says."""
    from peft import LoraConfig, LoraModel

    model = get_peft_model(base_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert type(model.base_model) is LoraModel
    model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("grit", GritConfig(target_modules="all-linear"))


def test_peft_type_behaves_as_a_member():
    import pickle

    member = PeftType.GRIT
    assert (
        member is PeftType("GRIT") is PeftType["GRIT"] is copy.deepcopy(member) is pickle.loads(pickle.dumps(member))
    )
    assert member in list(PeftType)
    assert member == "GRIT"
    assert json.dumps({"peft_type": member}) == '{"peft_type": "GRIT"}'


def test_registration_works_in_every_order(tmp_path):
    orders = [
        "import hf_gradtools, peft",
        "import peft, hf_gradtools",
        "import hf_gradtools.grit",
        "from hf_gradtools import GritConfig",
        "import hf_gradtools; from peft.utils import PeftType",
        "import torch, transformers, hf_gradtools; from transformers import Trainer",
    ]
    for order in orders:
        check = (
            "from peft import get_peft_config, PeftType; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as m; "
        )
        code = f"{order}; {check} assert m[PeftType.GRIT].__name__ == 'GritModel'"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (order, done.stderr[-2000:])


def test_embeddings_ride_along(tmp_path):
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    assert isinstance(model.base_model, GritModel)
    assert all(name.endswith("q_proj") for name in model.base_model.ranks())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))
