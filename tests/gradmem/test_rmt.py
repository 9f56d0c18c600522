"""The forward-only baseline."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from hf_gradtools.gradmem import RMTConfig, RMTForCausalLM


GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=32, vocab_size=12, bos_token_id=1, eos_token_id=2)
CONTEXT = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [8, 9, 10, 11, 0, 0, 0], [5, 3, 0, 0, 0, 0, 0]])
MASK = (CONTEXT != 0).long()
QUERY = torch.tensor([[4, 5, 9], [8, 3, 3], [3, 4, 5]])


def build(**options):
    torch.manual_seed(0)
    config = RMTConfig(base_config=copy.deepcopy(GPT2), n_mem_tokens=2, **options)
    model = RMTForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def naive_write(model, ids, segment_length):
    """One context, alone, by segments of the definition."""
    mem = model.mem[None]
    for start in range(0, len(ids), segment_length):
        part = model.get_input_embeddings()(torch.tensor([ids[start : start + segment_length]]))
        parts = [model.write_st[None], mem, model.write_end[None], part, mem]
        hidden = model.backbone.transformer(inputs_embeds=torch.cat(parts, 1)).last_hidden_state
        mem = hidden[:, -2:]
    return mem


@pytest.mark.parametrize("segment_length", [2, 3, 7])
def test_a_write_is_the_definition_for_each_row_of_a_ragged_batch(segment_length):
    model = build(segment_length=segment_length, n_ctrl_tokens=1)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(CONTEXT, MASK, strict=True)]
    expected = torch.cat([naive_write(model, row, segment_length) for row in rows])
    torch.testing.assert_close(model.write(CONTEXT, MASK).mem, expected, rtol=1e-10, atol=1e-10)
    left = torch.stack([row.roll(int((row == 0).sum())) for row in CONTEXT])
    torch.testing.assert_close(model.write(left, (left != 0).long()).mem, expected, rtol=1e-10, atol=1e-10)


def test_the_loss_trains_the_first_memory_through_all_segments():
    model = build(segment_length=3)
    loss = lambda: model(context_ids=CONTEXT, context_attention_mask=MASK, input_ids=QUERY, labels=QUERY).loss  # noqa: E731
    loss().backward()
    direction = torch.randn_like(model.mem)
    slope = (model.mem.grad * direction).sum()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.mem += sign * 1e-5 * direction
        values.append(loss().detach())
        with torch.no_grad():
            model.mem -= sign * 1e-5 * direction
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-5, atol=1e-9)


def test_it_saves_loads_and_generates(tmp_path):
    model = build(segment_length=4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, RMTForCausalLM)
    memory = again.write(CONTEXT, MASK)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(QUERY)}
    answer = again.generate(QUERY, memory=memory, **options)
    assert torch.equal(answer, again.generate(QUERY, memory=memory, use_cache=False, **options))


def test_options_of_gradient_steps_are_refused():
    with pytest.raises(ValueError, match="grad_mode, use_adam: a recurrent memory takes no gradient steps"):
        RMTConfig(base_config=GPT2, use_adam=True, grad_mode="first")
    with pytest.raises(ValueError, match="K=2"):
        build().write(CONTEXT, MASK, K=2)
    with pytest.raises(ValueError, match="smaller segment_length"):
        build().write(torch.ones(1, 30, dtype=torch.long))
