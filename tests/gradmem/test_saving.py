"""Memories and models come back to the bit, through the Auto classes, in a fresh process, and without the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM, GradMemory
from tests.gradmem.tiny import CASES, build, config, contexts, ids, model, pad


REPOSITORY = Path(__file__).parents[2]
MEMORIES = ["default", "own projections"]


def written(case="default"):
    return model(case).write(*pad(contexts()))


def same(one: GradMemory, other: GradMemory) -> bool:
    tensors = all(torch.equal(*pair) for pair in zip(one.fast, other.fast, strict=True))
    return tensors and one.provenance == other.provenance and one.mem.dtype == other.mem.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", MEMORIES)
def test_a_memory_comes_back_to_the_bit(case, dtype, tmp_path):
    memory = written(case).to(dtype)
    memory.save_pretrained(tmp_path / "new" / "folder")
    assert same(GradMemory.from_pretrained(tmp_path / "new" / "folder"), memory)
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl")) or name.startswith(".")}


def test_a_memory_is_replaced_by_one_saved_over_it(tmp_path):
    written().save_pretrained(tmp_path)
    written()[1].save_pretrained(tmp_path)
    assert same(GradMemory.from_pretrained(tmp_path), written()[1])


@pytest.mark.parametrize("case", MEMORIES)
def test_samples_of_memories_can_be_taken_and_put_together(case):
    memory = written(case)
    assert len(memory) == 2
    parts = [memory[0], memory[1]]
    assert [len(part) for part in parts] == [1, 1]
    assert same(GradMemory.cat(parts), memory)
    assert same(memory[-1], parts[1])
    assert same(memory[0:2], memory)
    repeated = memory.repeat_interleave(2)
    assert same(repeated, GradMemory.cat([parts[0], parts[0], parts[1], parts[1]]))
    assert not same(parts[0], parts[1])
    with pytest.raises(IndexError):
        memory[2]


def test_a_memory_can_be_moved_and_cast():
    memory = written("own projections")
    assert {tensor.dtype for tensor in memory.to(torch.float32).fast} == {torch.float32}
    assert {tensor.device.type for tensor in memory.to("meta").fast} == {"meta"}
    assert memory.mem.dtype == torch.float64


def test_provenance_tells_what_was_written():
    one = model()
    memory = one.write(ids(1, 4), memory=one.write(*pad(contexts()))[1], K=3)
    (entry,) = memory.provenance
    assert [(write["K"], write["tokens"], len(write["inner_losses"])) for write in entry["writes"]] == [
        (2, 5, 2),
        (3, 4, 3),
    ]
    assert json.loads(json.dumps(memory.provenance)) == memory.provenance


def test_reading_a_saved_memory_is_reading_the_memory(tmp_path):
    one, memory = model("own projections"), written("own projections")
    memory.save_pretrained(tmp_path)
    again = GradMemory.from_pretrained(tmp_path)
    rows = ids(2, 4)
    assert torch.equal(one(memory=again, input_ids=rows).logits, one(memory=memory, input_ids=rows).logits)


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_to_the_bit(case, tmp_path):
    one = build(case, torch.float32)
    one.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is GradMemGPTForCausalLM
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    memory, query = one.write(*pad(contexts())), ids(2, 4)
    assert torch.equal(again(memory=memory, input_ids=query).logits, one(memory=memory, input_ids=query).logits)
    torch.testing.assert_close(again.write(*pad(contexts())).mem, memory.mem, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("case", "tied"), [("GPT-2, tied", True), ("everything", True), ("GPT-2, untied", False)])
def test_tied_weights_stay_tied_and_are_in_the_file_once(case, tied, tmp_path):
    build(case, torch.float32).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    names = load_file(tmp_path / "model.safetensors").keys()
    assert len({"backbone.lm_head.weight", "backbone.transformer.wte.weight"} & names) == (1 if tied else 2)


def test_the_configuration_comes_back_with_that_of_the_backbone(tmp_path):
    one = config("everything", grad_mode="second", last_k_second_order=1)
    one.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is GradMemConfig
    assert type(again.base_config) is GPT2Config
    assert (again.vocab_size, again.hidden_size, again.eos_token_id) == (12, 16, 2)
    ours = {name for name in vars(one) if not name.startswith("_")}
    for name in ours - {"base_config", "transformers_version", "architectures", "dtype"}:
        assert getattr(again, name) == getattr(one, name), name
    by_dict = GradMemConfig(**{**one.to_dict(), "base_config": one.base_config.to_dict()})
    assert by_dict.to_dict() == one.to_dict()


def test_a_model_without_its_memory_says_so(tmp_path):
    """Not silently random: transformers names what is missing."""
    from safetensors.torch import save_file

    build(dtype=torch.float32).save_pretrained(tmp_path)
    kept = {name: v for name, v in load_file(tmp_path / "model.safetensors").items() if name != "mem"}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loading["missing_keys"]) == {"mem"}


SAY = """
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    memory = memory_of(model, folder)
    query = torch.tensor([[3, 4, 5]])
    tokens = model.generate(query, memory=memory, max_new_tokens=4, do_sample=False)
    torch.save((model(memory=memory, input_ids=query).logits, tokens), folder + "/found.pt")
"""

WITH_THE_PACKAGE = f"""
import sys
from hf_gradtools import GradMemory

def memory_of(model, folder):
    return GradMemory.from_pretrained(folder + "/memory")
{SAY}
"""

WITHOUT_IT = f"""
import os, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gradtools":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
os.environ.update(HF_MODULES_CACHE=sys.argv[1] + "/modules", HF_HUB_OFFLINE="1")

def memory_of(model, folder):
    return model.write(torch.tensor([[7, 8, 9, 3]]))
{SAY}
assert not [name for name in sys.modules if name.split(".")[0] == "hf_gradtools"]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models that carry their code, of memories that they have written, and what they say."""
    found = {}
    GradMemConfig.register_for_auto_class()
    GradMemGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        for case in ("default", "everything"):
            folder, one = tmp_path_factory.mktemp("saved"), build(case, torch.float32)
            one.save_pretrained(folder)
            memory, query = one.write(torch.tensor([[7, 8, 9, 3]])), torch.tensor([[3, 4, 5]])
            memory.save_pretrained(folder / "memory")
            logits = one(memory=memory, input_ids=query).logits
            found[folder] = logits, one.generate(query, memory=memory, max_new_tokens=4, do_sample=False)
    finally:
        GradMemConfig._auto_class = GradMemGPTForCausalLM._auto_class = None
    return found


@pytest.mark.parametrize("code", [WITH_THE_PACKAGE, WITHOUT_IT], ids=["with the package", "without it"])
def test_another_process_answers_as_this_one(code, saved):
    command = [sys.executable, "-c", code, *map(str, saved)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.sep, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (logits, tokens) in saved.items():
        found_logits, found_tokens = torch.load(folder / "found.pt")
        torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)  # with transformers' own norms
        assert torch.equal(found_tokens, tokens)


def test_files_of_memories_hold_tensors_and_json_alone(tmp_path):
    written().save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"mem"}
        assert json.loads(file.metadata()["provenance"]) == written().provenance


def test_where_there_is_no_memory_loading_says_so(tmp_path):
    with pytest.raises(OSError, match="gradmem_memory"):
        GradMemory.from_pretrained(tmp_path)
