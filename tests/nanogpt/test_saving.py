"""Saved and loaded, models are the same to the bit: through the Auto classes, and without the package at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel
from tests.nanogpt.tiny import CASES, build, ids


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_saved_model_comes_back_to_the_bit(case, tmp_path):
    one = build(case, torch.float32)
    one.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is NanoGPTForCausalLM
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(again(ids(2, 6)).logits, one(ids(2, 6)).logits)
    tied = again.lm_head.weight is again.transformer.wte.weight
    assert tied == one.config.tie_word_embeddings


def test_tied_weights_are_in_the_file_once(tmp_path):
    build(dtype=torch.float32).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) + ("transformer.wte.weight" in names) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")] == []


@torch.no_grad()
def test_the_base_model_loads_from_the_language_model(tmp_path):
    one = build(dtype=torch.float32)
    one.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is NanoGPTModel
    assert torch.equal(base(ids(1, 5)).last_hidden_state, one.transformer(ids(1, 5)).last_hidden_state)


def test_the_auto_classes_know_the_configuration(tmp_path):
    NanoGPTConfig(vocab_size=9, attention_variant=["causal", "ssm"]).save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is NanoGPTConfig
    assert found.attention_variant == ["causal", "ssm"]
    assert type(AutoModelForCausalLM.from_config(NanoGPTConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=2))) is (
        NanoGPTForCausalLM
    )


@torch.no_grad()
def test_hidden_states_and_weights_of_attention_are_given_on_request():
    one, rows = build(), ids(2, 5)
    one.set_attn_implementation("eager")
    out = one(rows, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == one.config.n_layer + 1
    assert [weights.shape for weights in out.attentions] == [(2, 4, 5, 5)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 5, dtype=torch.float64))


@torch.no_grad()
def test_part_of_the_logits_can_be_asked_for():
    one, rows = build(), ids(2, 5)
    torch.testing.assert_close(one(rows, logits_to_keep=2).logits, one(rows).logits[:, -2:])


def in_a_fresh_process(code, *arguments, isolated=False, **environment):
    """Standard output of a new interpreter that does not see the repository's folder."""
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(os.sep), env={**os.environ, **environment}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


AUTO = """
import sys, torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__module__, type(model).__name__)
"""


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "transformers first"])
def test_the_auto_classes_work_in_either_order_of_imports(ours_first, tmp_path):
    build(dtype=torch.float32).save_pretrained(tmp_path)
    imports = ["import hf_gradtools", "from transformers import AutoModelForCausalLM"]
    code = AUTO.format(imports="\n".join(imports if ours_first else imports[::-1]))
    found = in_a_fresh_process(code, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert found.split() == ["hf_gradtools.nanogpt.modeling_nanogpt", "NanoGPTForCausalLM"]


WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gradtools":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import os
os.environ.update(HF_MODULES_CACHE=sys.argv[2], HF_HUB_OFFLINE="1")
import torch
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 7)[None]
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save({"logits": model(ids).logits, "text": model.generate(ids, max_new_tokens=4, do_sample=False)},
               folder + "/found.pt")
    model.save_pretrained(folder + "/again")
assert not any(name.split(".")[0] == "hf_gradtools" for name in sys.modules)
print("done", end="")
"""


@pytest.fixture
def self_contained(tmp_path, monkeypatch):
    """Folders of models with the code that they need, and the models."""
    monkeypatch.setattr(NanoGPTConfig, "_auto_class", None)
    monkeypatch.setattr(NanoGPTForCausalLM, "_auto_class", None)
    NanoGPTConfig.register_for_auto_class()
    NanoGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    models = {}
    for number, case in enumerate(["default", "ssm in turn", "mlp=kan", "all positions", "softmax=consmax"]):
        folder = tmp_path / f"model{number}"
        models[folder] = build(case, torch.float32)
        models[folder].save_pretrained(folder)
    return models


def test_a_model_runs_where_the_package_is_not_installed(self_contained, tmp_path):
    folders = list(self_contained)
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["auto_map"].keys() >= {"AutoModelForCausalLM"}
    cache = tmp_path / "modules"
    assert in_a_fresh_process(WITHOUT_THE_PACKAGE, "", cache, *folders, isolated=True) == "done"
    for folder, one in self_contained.items():
        found = torch.load(folder / "found.pt")
        with torch.no_grad():
            row = torch.arange(1, 7)[None]
            torch.testing.assert_close(found["logits"], one(row).logits, atol=1e-6, rtol=1e-6)
            assert torch.equal(found["text"], one.generate(row, max_new_tokens=4, do_sample=False))
        assert (folder / "again" / "modeling_nanogpt.py").exists()  # saved again, it still carries its code


def test_no_copied_file_imports_from_above_its_folder(self_contained):
    folder = next(iter(self_contained))
    copied = {path.name for path in folder.glob("*.py")}
    assert {"modeling_nanogpt.py", "configuration_nanogpt.py"} <= copied
    for path in folder.glob("*.py"):
        assert "from .." not in path.read_text(), path.name
