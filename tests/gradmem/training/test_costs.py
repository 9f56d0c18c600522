"""Operations by formula are those that torch counts in the model itself."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM
from hf_gradtools.gradmem.training.costs import answer_costs


CONTEXT, QUERY, ANSWER = 40, 7, 3


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def build(base, **memory):
    torch.manual_seed(0)
    config = GradMemConfig(base_config=base, n_mem_tokens=5, n_ctrl_tokens=1, **memory)
    model = GradMemGPTForCausalLM._from_config(config, attn_implementation="eager").eval()
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "base",
    [
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
            head_dim=16, num_key_value_heads=4,
        ),
        GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50, n_positions=64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("K", [1, 2])
def test_they_are_what_torch_counts(base, K):
    model = build(base, K=K, use_write_head=True)
    ids = torch.randint(4, 50, (1, CONTEXT))
    costs = answer_costs(model, CONTEXT, QUERY, ANSWER)
    backbone = model.backbone.base_model
    prefix = counted(lambda: backbone(inputs_embeds=model.mem[None].expand(1, -1, -1)[:, [0] * model.n_prefix]))
    written = counted(lambda: model.write(ids))
    assert written + prefix == pytest.approx(costs.write, rel=0.03)
    assert counted(lambda: backbone(ids)) == pytest.approx(costs.context, rel=0.01)
    whole = torch.randint(4, 50, (1, CONTEXT + QUERY))
    prompt = counted(lambda: model.backbone(whole, logits_to_keep=ANSWER))
    assert prompt == pytest.approx(costs.prompt, rel=0.01)
    cache = backbone(ids, use_cache=True).past_key_values
    cached = counted(lambda: model.backbone(whole[:, -QUERY:], past_key_values=cache, logits_to_keep=ANSWER))
    assert cached == pytest.approx(costs.cached, rel=0.01)


def test_the_crossing_is_the_first_number_of_queries_that_is_cheaper():
    model = build(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
    costs = answer_costs(model, 2000, QUERY, ANSWER)
    for crossing, rival in ((costs.crossing, "prompt"), (costs.crossing_cached, "kept context")):
        assert costs.per_query(crossing)["memory"] < costs.per_query(crossing)[rival]
        assert costs.per_query(crossing - 1)["memory"] >= costs.per_query(crossing - 1)[rival]
    assert costs.crossing < costs.crossing_cached
    short = answer_costs(model, 1, QUERY, ANSWER)
    assert short.crossing_cached == float("inf")  # reading the memory is longer than reading one token
