"""A memory around a causal LM that is there already, and around one with an adapter that has been trained."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM, get_gradmem_model
from tests.gradmem.tiny import SIZES, backbone_config, batch, contexts, enlarge, gap, ids, pad


@pytest.fixture(params=["llama", "gpt2"])
def base(request):
    one = AutoModelForCausalLM.from_config(backbone_config(request.param)).eval()
    enlarge(one)
    return one


def adapted(base):
    one = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    enlarge(one)
    return one.eval()


def test_the_backbone_is_the_model_that_was_given(base):
    before, logits = copy.deepcopy(base.state_dict()), base(ids(2, 5)).logits
    one = get_gradmem_model(base, GradMemConfig(**SIZES))
    assert type(one) is GradMemGPTForCausalLM
    assert {name: v for name, v in one.named_parameters() if not name.startswith("backbone.")}.keys() == {"mem"}
    for name, value in one.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(one.backbone(ids(2, 5)).logits, logits)


def test_the_configuration_that_was_given_stays_as_it_is(base):
    config = GradMemConfig(**SIZES)
    before = config.to_dict()
    get_gradmem_model(base, config)
    assert config.to_dict() == before


@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_is_there_for_writing_and_reading(base, frozen):
    peft = adapted(base)
    merged = copy.deepcopy(peft).merge_and_unload()
    torch.manual_seed(0)
    config = GradMemConfig(freeze_backbone=frozen, **SIZES)
    one, plain = get_gradmem_model(peft, config), get_gradmem_model(merged, config)
    with torch.no_grad():
        plain.mem.copy_(one.mem)
    rows = pad(contexts())
    assert gap(one.write(*rows).mem, plain.write(*rows).mem) < 1e-3
    memory = one.write(*rows)
    torch.testing.assert_close(
        one(memory=memory, input_ids=ids(2, 4)).logits, plain(memory=memory, input_ids=ids(2, 4)).logits,
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip
    one(**batch()).loss.backward()
    trained = {name for name, p in one.named_parameters() if p.grad is not None and name != "mem"}
    assert any("lora_" in name for name in trained)
    assert all("lora_" in name for name in trained)


def test_an_adapter_and_one_for_writing_stand_together(base, tmp_path):
    options = {"freeze_backbone": True, "use_write_lora": True, "write_lora_r": 2, **SIZES}
    one = get_gradmem_model(adapted(base), GradMemConfig(**options))
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "lora_B.write" in name:
                parameter.normal_()
    one.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    memory = one.write(*pad(contexts()))
    torch.testing.assert_close(again.write(*pad(contexts())).mem, memory.mem, rtol=1e-3, atol=1e-4)
    inputs = {"memory": memory, "input_ids": ids(2, 4)}
    assert torch.equal(again(**inputs).logits, one(**inputs).logits)
    again.train()(**batch()).loss.backward()
    assert {name for name, p in again.named_parameters() if p.grad is not None} == {
        name for name, _ in one.named_parameters() if name == "mem" or "lora_" in name
    }


def test_type_mode_and_generation_are_the_models(base):
    base.generation_config.max_new_tokens = 3
    one = get_gradmem_model(base.to(torch.bfloat16), GradMemConfig(n_ctrl_tokens=1, **SIZES))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert not one.training
    assert one.generate(ids(1, 4), context_ids=ids(1, 8)).shape[1] <= 7


def test_the_write_head_and_projection_begin_as_nothing_new(base):
    rows = pad(contexts())
    fancy = {"use_write_head": True, "use_mem_proj": True, "mem_proj_mode": "proj", "use_write_lora": True}
    plain = get_gradmem_model(copy.deepcopy(base), GradMemConfig(**SIZES))
    one = get_gradmem_model(base, GradMemConfig(**SIZES, **fancy))
    with torch.no_grad():
        one.mem.copy_(plain.mem)
    torch.testing.assert_close(one.inner_loss(*rows), plain.inner_loss(*rows))
