"""A pretrained causal LM with a memory around it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_gradtools import GradMemConfig, GradMemGPTForCausalLM, get_gradmem_model


SIZES = {"vocab_size": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, **SIZES)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **SIZES)
CONTEXT = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 3]])
QUERY = torch.tensor([[4, 5, 9], [8, 3, 3]])


def build(config=LLAMA, implementation="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_wrapped_model_attends_as_it_did(config, implementation):
    model = build(config, implementation)
    before = model(QUERY).logits
    GradMemConfig(base_config=model.config)
    wrapped = get_gradmem_model(model, GradMemConfig(n_mem_tokens=2))
    assert wrapped.backbone.config._attn_implementation == wrapped.config._attn_implementation == implementation
    torch.testing.assert_close(wrapped.backbone(QUERY).logits, before, rtol=0, atol=0)
    fresh = GradMemGPTForCausalLM(copy.deepcopy(wrapped.config)).eval()
    fresh.load_state_dict(wrapped.state_dict())
    memory = wrapped.write(CONTEXT)
    torch.testing.assert_close(wrapped(QUERY, memory=memory).logits, fresh(QUERY, memory=fresh.write(CONTEXT)).logits)


def test_answers_are_not_seen_by_the_tokens_before_them():
    model = get_gradmem_model(build(), GradMemConfig(n_mem_tokens=2, n_ctrl_tokens=1))
    memory = model.write(CONTEXT)
    other = QUERY.clone()
    other[:, -1] = 7
    logits = [model(ids, memory=memory).logits[:, :-1] for ids in (QUERY, other)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_it_is_the_model_itself_and_keeps_its_type():
    model = build().to(torch.bfloat16)
    wrapped = get_gradmem_model(model, GradMemConfig())
    assert wrapped.backbone is model
    assert {parameter.dtype for parameter in wrapped.parameters()} == {torch.bfloat16}
    assert not wrapped.training


def test_a_name_is_loaded(tmp_path):
    build().save_pretrained(tmp_path)
    wrapped = get_gradmem_model(tmp_path, GradMemConfig(n_mem_tokens=3), dtype=torch.float64)
    torch.testing.assert_close(wrapped.backbone.lm_head.weight, build().lm_head.weight.double())
    assert wrapped.write(CONTEXT).provenance[0]["model"] == str(tmp_path)


def test_a_frozen_backbone_trains_only_what_is_around_it():
    config = GradMemConfig(freeze_backbone=True, use_write_lora=True, use_write_head=True, n_ctrl_tokens=1)
    model = get_gradmem_model(build(), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name or not name.startswith("backbone.") for name in trained)
    model(context_ids=CONTEXT, input_ids=QUERY, labels=QUERY).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_an_adapter_of_the_backbone_trains_is_saved_and_read(config, tmp_path):
    adapted = get_peft_model(build(config), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    before = adapted(QUERY).logits
    model = get_gradmem_model(adapted, GradMemConfig(freeze_backbone=True, use_write_lora=True))
    torch.testing.assert_close(model.backbone(QUERY).logits, before)
    model(context_ids=CONTEXT, input_ids=QUERY, labels=QUERY).loss.backward()
    got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[-2] for name in got if "lora_" in name} == {"default", "write"}
    assert not any(name.startswith("backbone.") and "lora_" not in name for name in got)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again(QUERY, memory=again.write(CONTEXT)).logits, model(QUERY, memory=model.write(CONTEXT)).logits
    )
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_models_that_cap_their_logits_write_with_capped_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = Gemma2Config(
        intermediate_size=32, final_logit_softcapping=0.5, attn_logit_softcapping=None, **sizes, **SIZES
    )
    model = get_gradmem_model(Gemma2ForCausalLM(config).eval(), GradMemConfig(n_mem_tokens=2))
    mem = model.mem[None].expand(2, -1, -1)
    inputs = torch.cat([mem, model.get_input_embeddings()(CONTEXT)], 1)
    logits = model.backbone(inputs_embeds=inputs).logits[:, 1:-1]
    expected = torch.nn.functional.cross_entropy(logits.mT, CONTEXT, reduction="none").mean(1)
    assert logits.abs().max() <= 0.5
    torch.testing.assert_close(model.inner_loss(CONTEXT), expected)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="base_config is not the model's"):
        get_gradmem_model(build(), GradMemConfig(base_config=GPT2))
    adapted = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM"), adapter_name="other")
    with pytest.raises(ValueError, match="named 'default'"):
        get_gradmem_model(adapted, GradMemConfig())


def test_gpt2_keeps_its_tied_weights(tmp_path):
    model = get_gradmem_model(GPT2LMHeadModel(copy.deepcopy(GPT2)), GradMemConfig())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.backbone.lm_head.weight is again.backbone.transformer.wte.weight


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_writing_works_wherever_gradients_are_off(context):
    model = get_gradmem_model(build(), GradMemConfig(K=2, inner_lr=0.5))
    expected = model.write(CONTEXT).mem
    with context():
        memory = model.write(CONTEXT.clone(), torch.ones_like(CONTEXT))
        answer = model(QUERY.clone(), memory=memory).logits
        at_once = model(QUERY.clone(), context_ids=CONTEXT.clone()).logits
    torch.testing.assert_close(memory.mem, expected)
    torch.testing.assert_close(at_once, answer)
    assert not memory.mem.requires_grad


def test_new_tokens_are_written_and_read():
    model = get_gradmem_model(build(), GradMemConfig(use_write_head=True))
    model.resize_token_embeddings(14)
    assert model.config.vocab_size == model.backbone.config.vocab_size == len(model.write_head.weight) == 14
    memory = model.write(torch.tensor([[12, 13, 5]]))
    assert model(QUERY, memory=memory).logits.shape == (2, 3, 14)


def test_copies_of_data_parallel_are_refused():
    model = get_gradmem_model(build(), GradMemConfig())
    model._is_replica = True  # what torch.nn.DataParallel marks its copies with
    with pytest.raises(ValueError, match=r"DataParallel: .* Use DistributedDataParallel"):
        model(QUERY, context_ids=CONTEXT, labels=QUERY)
