"""Backbones that do something else than most, and what is put around or into a model."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gradtools import GradMemConfig, GradMemGPTForCausalLM, GradMemory, NanoGPTConfig, get_gradmem_model


SIZES = {"vocab_size": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(intermediate_size=32, **LAYERS, **SIZES)
MISTRAL = MistralConfig(intermediate_size=32, num_key_value_heads=1, sliding_window=6, **LAYERS, **SIZES)
GEMMA = Gemma3TextConfig(
    intermediate_size=32, num_key_value_heads=1, head_dim=8, sliding_window=6, **LAYERS, **SIZES,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
BLOOM = BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SIZES)
OPT = OPTConfig(
    word_embed_proj_dim=8, ffn_dim=32, max_position_embeddings=64, do_layer_norm_before=True, **LAYERS, **SIZES
)
NANO = NanoGPTConfig(vocab_size=12, block_size=64, n_layer=2, n_head=2, n_embd=16, attention_variant=["causal", "ssm"])
BACKBONES = {"mistral": MISTRAL, "gemma3": GEMMA, "bloom": BLOOM, "opt": OPT, "nanogpt": NANO, "llama": LLAMA}

CONTEXT = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [8, 9, 10, 11, 3, 0, 0, 0]])
MASK = (CONTEXT != 0).long()
QUERY = torch.tensor([[4, 5, 9, 3], [8, 3, 7, 5]])


def build(config, **options):
    torch.manual_seed(0)
    made = GradMemConfig(base_config=copy.deepcopy(config), n_mem_tokens=2, inner_lr=0.5, **options)
    model = GradMemGPTForCausalLM(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(8)
    return model


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def test_padding_on_the_left_of_a_query_changes_nothing(backbone):
    model = build(backbone)
    memory = model.write(CONTEXT, MASK)
    padding = torch.zeros(1, 7, dtype=torch.long)
    left = torch.cat([padding, QUERY[:1]], 1)
    other = torch.cat([torch.full((1, 7), 6), QUERY[1:]], 1)
    ids, mask = torch.cat([left, other]), torch.ones(2, 11, dtype=torch.long)
    mask[0, :7] = 0
    together = model(ids, attention_mask=mask, memory=memory)
    alone = model(QUERY[:1], memory=memory[0])
    torch.testing.assert_close(together.logits[:1, 7:], alone.logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(QUERY[:1], attention_mask=torch.ones_like(QUERY[:1]), memory=memory[0], **options)
    for use_cache in (True, False):
        given = model.generate(ids, attention_mask=mask, memory=memory, use_cache=use_cache, **options)
        assert given[0, 11:].tolist() == expected[0, 4:].tolist()


def test_gradients_go_through_a_write_of_any_backbone(backbone):
    grads = []
    for recompute in (True, False):
        model = build(backbone, K=2, recompute_write=recompute, use_write_head=True)
        model(context_ids=CONTEXT, context_attention_mask=MASK, input_ids=QUERY, labels=QUERY).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert model.mem.grad.abs().sum() > 0
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


def test_a_context_is_written_alike_alone_and_beside_others(backbone):
    model = build(backbone, K=2)
    together = model.write(CONTEXT, MASK).mem
    torch.testing.assert_close(model.write(CONTEXT[1:, :5]).mem, together[1:], rtol=1e-4, atol=1e-4)


def test_adapters_on_the_write_head_and_the_projection_take_part():
    options = {"use_write_head": True, "use_mem_proj": True, "mem_proj_mode": "proj"}
    lora = LoraConfig(r=2, target_modules=["write_head", "mem_proj"], init_lora_weights=False)
    model = get_peft_model(build(LLAMA, **options), lora)
    batch = {"context_ids": CONTEXT, "context_attention_mask": MASK, "input_ids": QUERY, "labels": QUERY}
    loss = model(**batch).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    torch.testing.assert_close(model.merge_and_unload()(**batch).loss, loss)


def test_an_adapter_that_comes_to_the_output_layer_after_a_write_is_seen():
    model = build(LLAMA)
    before = model.write(CONTEXT, MASK).mem
    lora = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    after = adapted.base_model.model.write(CONTEXT, MASK).mem
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload().write(CONTEXT, MASK).mem, after, rtol=1e-4, atol=1e-5)


def test_exchanged_parameters_are_refused_where_they_would_be_lost():
    batch = {"context_ids": CONTEXT, "input_ids": QUERY, "labels": QUERY}
    for recompute in (True, False):
        model = build(LLAMA, K=2, recompute_write=recompute)
        values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = torch.func.functional_call(model, values, kwargs=batch).loss
        if recompute:
            with pytest.raises(ValueError, match="recompute_write=False"):
                loss.backward()
        else:
            model(**batch).loss.backward()
            grad = torch.autograd.grad(loss, values["mem"])[0]
            torch.testing.assert_close(grad, model.mem.grad)


def test_the_whole_model_can_be_checkpointed():
    model = build(LLAMA, K=3)
    batch = {"context_ids": CONTEXT, "input_ids": QUERY, "labels": QUERY}
    grads = []
    for run in (lambda: model(**batch).loss, lambda: checkpoint(lambda: model(**batch).loss, use_reentrant=False)):
        model.zero_grad()
        run().backward()
        grads.append(model.mem.grad.clone())
    torch.testing.assert_close(*grads)


def test_options_that_change_are_checked_when_they_are_used():
    model = build(LLAMA)
    model.config.grad_mode = "fourth"
    with pytest.raises(ValueError, match="grad_mode='fourth' is unknown"):
        model.write(CONTEXT, MASK)
    model.config.grad_mode = "first"
    with pytest.raises(ValueError, match="K=3 is for writing"):
        model(QUERY, memory=model.write(CONTEXT, MASK), K=3)


def test_generation_is_configured_as_ever():
    model = build(LLAMA)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    ones = torch.ones_like(QUERY)
    given = model.generate(QUERY, settings, memory=model.write(CONTEXT, MASK), attention_mask=ones)
    assert given.shape[1] <= 7


def test_a_memory_is_indexed_as_a_list():
    memory = GradMemory(torch.arange(12.0).view(3, 2, 2))
    rows = {"first": memory[0], "last": memory[-1], "turned": memory[::-1], "mask": memory[[True, False, True]]}
    found = {name: part.mem[:, 0, 0].tolist() for name, part in rows.items()}
    assert found == {"first": [0], "last": [8], "turned": [8, 4, 0], "mask": [0, 8]}
    assert len(memory[[]]) == 0
    assert torch.equal(GradMemory.cat(memory[i] for i in (1, 2)).mem, memory[1:].mem)
    assert [len(part) for part in memory] == [1, 1, 1]
    with pytest.raises(IndexError):
        memory[3]
    with pytest.raises(TypeError, match="indexed by a number"):
        memory[True]


def test_auto_classes_know_both_kinds():
    made = GradMemConfig(base_config=LLAMA)
    assert isinstance(AutoModelForCausalLM.from_config(made), GradMemGPTForCausalLM)


def test_threads_that_write_and_read_do_not_disturb_each_other():
    model = build(LLAMA, K=2, use_write_lora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wanted = model.write(CONTEXT, MASK)
    logits = model(QUERY, memory=wanted).logits.detach()

    def work(number):
        for _ in range(5):
            if number % 2:
                torch.testing.assert_close(model.write(CONTEXT, MASK).mem, wanted.mem)
            else:
                torch.testing.assert_close(model(QUERY, memory=wanted).logits, logits)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_learned_biases_of_attention_get_their_gradients():
    sizes = {"vocab_size": 12, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    config = NanoGPTConfig(**sizes, use_fire_embeddings=True, use_rotary_embeddings=False)
    grads = []
    for implementation in ("sdpa", "eager"):
        model = build(config)
        model.set_attn_implementation(implementation)
        model(context_ids=CONTEXT, input_ids=QUERY, labels=QUERY).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "bias" in n]))
    assert grads[1].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_a_compiled_model_has_the_same_gradients():
    batch = {"context_ids": CONTEXT, "input_ids": QUERY, "labels": QUERY}
    model = build(LLAMA, K=2)
    model(**batch).loss.backward()
    wanted = model.mem.grad.clone()
    model.zero_grad()
    torch.compile(model, backend="eager")(**batch).loss.backward()
    torch.testing.assert_close(model.mem.grad, wanted, rtol=1e-4, atol=1e-7)


def test_what_is_set_while_loading_is_checked(tmp_path):
    GradMemConfig(base_config=LLAMA).save_pretrained(tmp_path)
    assert GradMemConfig.from_pretrained(tmp_path, K=3).K == 3
    with pytest.raises(ValueError, match="K=-2 must be at least 0"):
        GradMemConfig.from_pretrained(tmp_path, K=-2)
    config = GradMemConfig(base_config=LLAMA, inner_lr=4, write_lora_target_modules=("q_proj",))
    config.n_mem_tokens = 0
    with pytest.raises(ValueError, match="n_mem_tokens=0"):
        GradMemGPTForCausalLM(config)


def test_only_causal_models_are_wrapped():
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    for model in (encoder_decoder, build(LLAMA), torch.nn.Linear(2, 2), build(LLAMA).backbone.model):
        with pytest.raises(ValueError, match="pass a causal LM"):
            get_gradmem_model(model, GradMemConfig())
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        get_gradmem_model(get_peft_model(build(LLAMA).backbone, lora), GradMemConfig())


def test_memories_that_are_shared_keep_their_own_story(tmp_path):
    model = build(LLAMA)
    memory = model.write(CONTEXT, MASK)
    copies = memory.repeat_interleave(2)
    copies.provenance[0]["writes"].clear()
    assert len(copies.provenance[1]["writes"]) == len(memory.provenance[0]["writes"]) == 1
    memory.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    memory.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    save_file({"mem": memory.mem}, tmp_path / "gradmem_memory.safetensors")
    with pytest.raises(ValueError, match="where its tensors are from"):
        GradMemory.from_pretrained(tmp_path)
    again = model.write(CONTEXT, MASK, memory=memory.mem)
    torch.testing.assert_close(again.mem, model.write(CONTEXT, MASK, memory=memory).mem)


CACHELESS = {
    "gpt": OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, **SIZES),
    "mamba": MambaConfig(**LAYERS, **SIZES),
}


@pytest.mark.parametrize("name", CACHELESS)
def test_backbones_that_keep_no_positions_generate_without_a_cache(name):
    model = build(CACHELESS[name])
    options = {"memory": model.write(CONTEXT[:1]), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    message = {"gpt": "keeps no cache of what it read. Pass use_cache=False", "mamba": "get_seq_length"}[name]
    with pytest.raises(ValueError, match=message):
        model.generate(QUERY[:1], **options)
    logits = model(QUERY[:1], memory=options["memory"]).logits[0, -1]
    logits[2] = -torch.inf  # no end yet
    given = model.generate(QUERY[:1], use_cache=False, **options)
    assert given.shape == (1, 7)
    assert given[0, 4] == logits.argmax()
