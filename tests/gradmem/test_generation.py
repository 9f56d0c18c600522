"""Generation from a memory: what the definition would say token by token, and what the bare backbone generates."""

import copy
from functools import cache

import pytest
import torch

from hf_gradtools.gradmem import GradMemory
from tests.gradmem.tiny import bare_backbone, ids, model, pad, reference, weight_name


CASES = ["default", "GPT-2, tied", "control tokens", "own projections", "write LoRA", "everything"]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@cache
def endless(case="default"):
    """A model that no token stops."""
    one = copy.deepcopy(model(case))
    one.generation_config.eos_token_id = None
    return one


def three(length=None):
    """Contexts and queries of three samples."""
    contexts = [ids(8, seed=1), ids(5, seed=2), ids(6, seed=3)]
    return contexts, [ids(length or size, seed=20 + size) for size in (3, 5, 2)]


CACHES = {"cache": {}, "no cache": {"use_cache": False}, "static cache": {"cache_implementation": "static"}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_is_that_of_the_definition(case, cache):
    one, definition = endless(case), reference(model(case))
    contexts, queries = three()
    rows, mask = pad(queries, "left")
    found = one.generate(rows, memory=one.write(*pad(contexts)), attention_mask=mask, **CACHES[cache], **GREEDY)
    assert torch.equal(found[:, :5], rows)
    for row, (context, query) in enumerate(zip(contexts, queries, strict=True)):
        assert torch.equal(found[row, 5:], definition.greedy(definition.write(context).state, query, NEW))


def backbone_generates(case, memory, query, **options):
    """The backbone as transformers has it continues the embeddings of memory, control tokens and query."""
    one, definition = endless(case), reference(model(case))
    bare = bare_backbone(one, "eager")
    bare.load_state_dict(
        {weight_name(f"backbone.{name}"): v for name, v in one.backbone.state_dict().items() if "lora_" not in name}
    )
    bare.generation_config.eos_token_id = None
    state = {"mem": memory.mem[0], "weight": memory.proj_weight, "bias": memory.proj_bias}
    state = {name: value for name, value in state.items() if value is not None}
    state |= {name: state[name][0] for name in state.keys() - {"mem"}}
    parts = [definition.shown(state), bare.get_input_embeddings()(query)]
    if one.config.n_ctrl_tokens:
        parts = [one.read_st, parts[0], one.read_end, parts[1]]
    embeddings = torch.cat(parts)[None].detach()
    torch.manual_seed(3)
    return bare.generate(inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2]).long(), **options)


STRATEGIES = {
    "beams": {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False},
    "several beams": {"max_new_tokens": NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampling": {"max_new_tokens": NEW, "do_sample": True, "temperature": 2.0},
    "several samples": {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": 3, "top_k": 5},
}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["default", "everything"])
def test_other_strategies_are_those_of_the_bare_backbone(case, strategy, use_cache):
    one, query = endless(case), ids(4, seed=9)
    memory = one.write(ids(1, 8, seed=1))
    expected = backbone_generates(case, memory, query, **STRATEGIES[strategy])
    torch.manual_seed(3)
    found = one.generate(query[None], memory=memory, use_cache=use_cache, **STRATEGIES[strategy])
    assert torch.equal(found[:, 4:], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_padded_queries_is_generated_row_by_row(strategy):
    one, options = endless(), {**STRATEGIES[strategy], "use_cache": True}
    if options["do_sample"]:
        options |= {"top_k": 1}  # rows share the random numbers
    contexts, queries = three()
    memory, each = one.write(*pad(contexts)), options.get("num_return_sequences", 1)
    rows, mask = pad(queries, "left")
    found = one.generate(rows, memory=memory, attention_mask=mask, **options)[:, 5:].unflatten(0, (3, each))
    for row, query in enumerate(queries):
        alone = one.generate(query[None], memory=memory[row], **options)
        assert torch.equal(found[row], alone[:, len(query) :])


@pytest.mark.parametrize("case", ["default", "own projections"])
def test_several_queries_to_a_memory(case):
    one, queries = endless(case), ids(6, 4, seed=9)
    memory = one.write(*pad(three()[0]))
    found = one.generate(queries, memory=memory, **GREEDY)
    assert torch.equal(found, one.generate(queries, memory=memory.repeat_interleave(2), **GREEDY))
    shared = one.generate(queries, memory=memory[1], **GREEDY)
    assert torch.equal(shared, one.generate(queries, memory=GradMemory.cat([memory[1]] * 6), **GREEDY))
    assert not torch.equal(shared, found)  # the memory does tell


@pytest.mark.parametrize("strategy", [{"num_beams": 2}, {}], ids=["beams", "greedy"])
def test_generation_from_contexts_is_a_write_and_a_generation(strategy):
    one, options = endless("control tokens"), {**GREEDY, **strategy}
    contexts, queries = three()
    (context_ids, context_mask), (rows, mask) = pad(contexts), pad(queries, "left")
    memory = one.write(context_ids, context_mask, K=3)
    expected = one.generate(rows, memory=memory, attention_mask=mask, **options)
    found = one.generate(
        rows, context_ids=context_ids, context_attention_mask=context_mask, K=3, attention_mask=mask, **options
    )
    assert torch.equal(found, expected)


def test_a_token_that_ends_ends():
    one = copy.deepcopy(endless())
    memory, query = one.write(ids(1, 8, seed=1)), ids(1, 4, seed=9)
    tokens = one.generate(query, memory=memory, **GREEDY)[0, 4:].tolist()
    one.generation_config.eos_token_id = tokens[2]
    assert one.generate(query, memory=memory, **GREEDY)[0, 4:].tolist() == tokens[: tokens.index(tokens[2]) + 1]


def test_max_length_counts_query_and_answer():
    one = endless()
    found = one.generate(ids(2, 4), memory=one.write(ids(2, 8)), max_length=9, do_sample=False)
    assert found.shape == (2, 9)


def test_scores_are_the_logits_of_reading():
    one = endless("GPT-2, tied")
    memory, query = one.write(ids(1, 8, seed=1)), ids(1, 4, seed=9)
    out = one.generate(query, memory=memory, return_dict_in_generate=True, output_logits=True, **GREEDY)
    expected = one(memory=memory, input_ids=out.sequences[:, :-1]).logits[:, 3:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected.float(), rtol=1e-5, atol=1e-6)


def test_embeddings_of_queries_are_continued():
    one, query = endless(), ids(2, 4)
    memory = one.write(ids(2, 8))
    found = one.generate(inputs_embeds=one.get_input_embeddings()(query), memory=memory, **GREEDY)
    assert torch.equal(found, one.generate(query, memory=memory, **GREEDY)[:, 4:])


def test_generation_leaves_memory_and_parameters_as_they_are():
    one = endless("own projections")
    memory = one.write(ids(1, 8))
    before = [tensor.clone() for tensor in memory.fast]
    one.generate(ids(1, 4), memory=memory, num_beams=2, **GREEDY)
    assert all(torch.equal(*pair) for pair in zip(before, memory.fast, strict=True))
    assert all(parameter.grad is None for parameter in one.parameters())
