"""What cannot be is refused early, by an error that names the argument, its value, and what to do."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM, GradMemory, get_gradmem_model
from tests.gradmem.tiny import POSITIONS, REFUSED, backbone_config, build, config, ids, model


QUERY = ids(2, 4)
CONFIGURATIONS = {
    "K below 0": ({"K": -1}, "K=-1"),
    "no memory at all": ({"n_mem_tokens": 0}, "n_mem_tokens=0"),
    "negative control tokens": ({"n_ctrl_tokens": -1}, "n_ctrl_tokens=-1"),
    "unknown mode": ({"grad_mode": "third"}, "grad_mode='third'.*'second'"),
    "unknown projection": ({"use_mem_proj": True, "mem_proj_mode": "fast"}, "mem_proj_mode='fast'.*per_sample"),
    "projection without its mode": ({"use_mem_proj": True}, "use_mem_proj=True.*mem_proj_mode"),
    "mode without a projection": ({"mem_proj_mode": "proj"}, "use_mem_proj=False.*mem_proj_mode"),
    "last steps below 0": ({"last_k_second_order": -1}, "last_k_second_order=-1"),
    "last steps in first order": ({"last_k_second_order": 1, "grad_mode": "first"}, "last_k_second_order=1.*'second'"),
    "rate of 0": ({"inner_lr": 0.0}, "inner_lr=0.0"),
    "negative clip": ({"inner_clip_value": -1.0}, "inner_clip_value=-1.0"),
    "clip to nothing": ({"inner_clip_norm": 0.0}, "inner_clip_norm=0.0"),
    "rank 0": ({"use_write_lora": True, "write_lora_r": 0}, "write_lora_r=0"),
    "dropout of more than all": ({"use_write_lora": True, "write_lora_dropout": 1.5}, "write_lora_dropout=1.5"),
    "type": ({"K": "two"}, "K"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(case):
    fields, message = CONFIGURATIONS[case]
    with pytest.raises(REFUSED, match=message):
        config(**fields)


def test_a_configuration_of_the_backbone_without_its_type():
    with pytest.raises(REFUSED, match="model_type"):
        GradMemConfig(base_config={"hidden_size": 16})


def test_a_model_without_the_configuration_of_a_backbone():
    with pytest.raises(REFUSED, match="base_config"):
        GradMemGPTForCausalLM(GradMemConfig())


def test_adapters_of_layers_that_are_not_there():
    with pytest.raises(ValueError, match="q_projection"):
        build(use_write_lora=True, write_lora_target_modules=["q_projection"])


@pytest.mark.parametrize("case", ["default", "GPT-2, tied"])
def test_sequences_longer_than_the_positions_reach(case):
    one, longest = model(case), POSITIONS - 3
    memory = one.write(ids(1, longest))
    one(memory=memory, input_ids=ids(1, longest))
    for call in (
        lambda rows: one.write(rows),
        lambda rows: one.inner_loss(rows),
        lambda rows: one(context_ids=rows, input_ids=QUERY[:1]),
        lambda rows: one(memory=memory, input_ids=rows),
    ):
        with pytest.raises(ValueError, match=rf"{longest + 1} tokens.*{POSITIONS}.*{longest}"):
            call(ids(1, longest + 1))
    with pytest.raises(ValueError, match=f"{POSITIONS}"):
        one.generate(QUERY[:1], memory=memory, max_new_tokens=longest, do_sample=False, min_new_tokens=longest)


def test_padding_counts_for_nothing_in_the_length_of_a_context():
    mask = torch.zeros(1, POSITIONS + 5, dtype=torch.long)
    mask[:, 10:20] = 1
    assert len(model().write(ids(1, POSITIONS + 5), mask)) == 1


CALLS = {
    "no memory": ({}, "memory"),
    "memory and contexts": ({"memory": True, "context_ids": ids(2, 5)}, "memory.*context_ids"),
    "K below 0": ({"context_ids": ids(2, 5), "K": -2}, "K=-2"),
    "contexts that do not go with the queries": ({"context_ids": ids(3, 5)}, "2 queries.*3"),
    "more memories than queries": ({"memory": 4}, "2 queries.*4"),
    "mask of another shape": (
        {"context_ids": ids(2, 5), "context_attention_mask": torch.ones(2, 4).long()},
        r"context_ids.*\(2, 4\)",
    ),
    "context of one dimension": ({"context_ids": ids(5)}, "context_ids"),
    "context of padding alone": (
        {"context_ids": ids(2, 5), "context_attention_mask": torch.tensor([[1] * 5, [0] * 5])},
        "context 1.*padding",
    ),
    "context of nothing": ({"context_ids": ids(2, 0)}, "no tokens"),
}


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("case", CALLS)
def test_calls(case, method):
    one, (inputs, message) = model(), CALLS[case]
    if "memory" in inputs:
        inputs = {**inputs, "memory": one.write(ids(int(inputs["memory"]), 5))}
    with pytest.raises(ValueError, match=message):
        one(input_ids=QUERY, **inputs) if method == "forward" else one.generate(QUERY, max_new_tokens=2, **inputs)


def test_queries_that_are_none_or_given_twice():
    memory = model().write(ids(1, 5))
    with pytest.raises(ValueError, match="input_ids"):
        model()(memory=memory)
    embeddings = model().get_input_embeddings()(QUERY)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model()(memory=memory, input_ids=QUERY, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="mask"):
        model()(memory=memory, input_ids=QUERY, attention_mask=torch.ones(2, 9).long())


MEMORIES = {
    "other width": GradMemory(torch.randn(2, 3, 8)),
    "other number of vectors": GradMemory(torch.randn(2, 5, 16)),
    "fast weights too many": GradMemory(torch.randn(2, 3, 16), torch.randn(2, 16, 16), torch.randn(2, 16)),
}


@pytest.mark.parametrize("case", MEMORIES)
def test_memories_of_another_model(case):
    one, memory = model(), MEMORIES[case]
    for call in (
        lambda: one(memory=memory, input_ids=QUERY),
        lambda: one.generate(QUERY, memory=memory, max_new_tokens=2),
        lambda: one.write(ids(2, 5), memory=memory),
        lambda: one.inner_loss(ids(2, 5), memory=memory),
    ):
        with pytest.raises(ValueError, match=r"memory.*\(3, 16\)"):
            call()


def test_memories_without_the_fast_weights_that_the_model_needs():
    with pytest.raises(ValueError, match=r"memory.*\(16, 16\)"):
        model("own projections")(memory=GradMemory(torch.randn(2, 3, 16)), input_ids=QUERY)


def test_a_write_that_goes_on_from_memories_of_another_number():
    with pytest.raises(ValueError, match="3 samples for 2 contexts"):
        model().write(ids(2, 5), memory=model().write(ids(3, 5)))


def test_memories_that_do_not_hold_together():
    with pytest.raises(ValueError, match="mem.*shape"):
        GradMemory(torch.randn(3, 16))
    with pytest.raises(ValueError, match="together"):
        GradMemory(torch.randn(2, 3, 16), torch.randn(2, 16, 16))
    with pytest.raises(ValueError, match="provenance"):
        GradMemory(torch.randn(2, 3, 16), provenance=[{}])
    with pytest.raises(ValueError, match="shapes"):
        GradMemory.cat([GradMemory(torch.randn(1, 3, 16)), GradMemory(torch.randn(1, 4, 16))])
    with pytest.raises(ValueError, match="at least one"):
        GradMemory.cat([])


def test_wrapping_a_model_of_two_adapters():
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    two = get_peft_model(AutoModelForCausalLM.from_config(backbone_config()), lora)
    two.add_adapter("other", lora)
    with pytest.raises(ValueError, match="other"):
        get_gradmem_model(two, GradMemConfig())
