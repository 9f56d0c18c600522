"""Reading: queries of any number and padding are answered from the memory alone."""

import copy

import pytest
import torch
from torch.nn import functional as F

from hf_gradtools.gradmem import GradMemory
from tests.gradmem.tiny import CASES, WIDTH, batch, build, contexts, gradients, ids, model, pad, queries, reference


CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def written(case="default"):
    return model(case).write(*pad(contexts()))


def rows_of(inputs):
    """What is read of a batch for training."""
    return {name: value for name, value in inputs.items() if not name.startswith("context")}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_definition(case, side):
    definition, inputs = reference(model(case)), batch(side=side)
    logits = model(case)(**inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 12)
    found = (row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True))
    for context, group in zip(contexts(), queries(), strict=True):
        state = definition.write(context).state
        for query in group:
            torch.testing.assert_close(next(found), definition.read(state, query.ids), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_one_call_is_a_write_and_a_read(case):
    inputs = batch()
    out, again = model(case)(**inputs), model(case)(memory=written(case), **rows_of(inputs))
    torch.testing.assert_close(again.logits, out.logits, **CLOSE)
    torch.testing.assert_close(out.memory, written(case).mem, **CLOSE)
    if not model(case).config.add_inner_loss_to_outer:
        torch.testing.assert_close(again.loss, out.loss, **CLOSE)


@pytest.mark.parametrize("case", ["default", "own projections"])
def test_one_memory_serves_all_queries(case):
    first = written(case)[0]
    inputs = rows_of(batch())
    expected = model(case)(memory=GradMemory.cat([first] * 4), **inputs)
    torch.testing.assert_close(model(case)(memory=first, **inputs).logits, expected.logits, **CLOSE)


def test_queries_of_a_context_stand_together():
    inputs = rows_of(batch())
    together = model()(memory=written(), **inputs).logits
    for row in range(4):
        alone = model()(memory=written()[row // 2], input_ids=queries()[row // 2][row % 2].ids[None]).logits
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], **CLOSE)


@pytest.mark.parametrize("case", ["default", "own projections"])
def test_what_was_written_does_not_follow_the_context(case):
    padded, mask = pad(contexts())
    memory = model(case).write(padded, mask)
    kept, inputs = memory.mem.clone(), rows_of(batch())
    expected = model(case)(memory=memory, **inputs).logits
    padded.fill_(7)
    mask.fill_(0)
    assert torch.equal(memory.mem, kept)
    assert torch.equal(model(case)(memory=memory, **inputs).logits, expected)


def test_reading_leaves_the_memory_as_it_is():
    memory = written()
    kept = memory.mem.clone()
    model()(memory=memory, **rows_of(batch()))
    assert torch.equal(memory.mem, kept)


def test_labels_are_shifted_and_minus_100_asks_for_nothing():
    inputs = rows_of(batch())
    inputs["labels"][0, 1:] = -100
    out = model()(memory=written(), **inputs)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    inputs["labels"][:, 0] = 5
    torch.testing.assert_close(model()(memory=written(), **inputs).loss, expected, **CLOSE)


def test_the_loss_divides_by_the_items_of_the_step():
    inputs = rows_of(batch())
    mean = model()(memory=written(), **inputs).loss
    part = model()(memory=written(), num_items_in_batch=torch.tensor(20), **inputs).loss
    torch.testing.assert_close(part * 20, mean * (inputs["labels"][:, 1:] != -100).sum(), **CLOSE)


@pytest.mark.parametrize("case", ["default", "inner loss added", "own projections"])
def test_two_micro_batches_are_one_batch(case):
    """As Trainer accumulates: the loss of either part is taken beside the labelled tokens of both."""
    whole = batch()
    one, items = copy.deepcopy(model(case)), (whole["labels"] != -100).sum()
    for part in range(2):
        cut = {name: v[part : part + 1] if "context" in name else v.chunk(2)[part] for name, v in whole.items()}
        one(num_items_in_batch=items, **cut).loss.backward()
    _, expected = gradients(model(case), **whole)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-8, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("keep", [1, 3])
def test_part_of_the_logits_can_be_asked_for(keep):
    inputs = {"memory": written(), "input_ids": ids(2, 5)}
    found = model()(logits_to_keep=keep, **inputs).logits
    torch.testing.assert_close(found, model()(**inputs).logits[:, -keep:], **CLOSE)


@pytest.mark.parametrize("case", ["default", "GPT-2, tied", "control tokens"])
def test_a_cache_continues_what_was_read(case):
    rows, memory = ids(2, 6), written(case)
    expected = model(case)(memory=memory, input_ids=rows).logits
    out = model(case)(memory=memory, input_ids=rows[:, :4], use_cache=True)
    torch.testing.assert_close(out.logits, expected[:, :4], **CLOSE)
    out = model(case)(input_ids=rows[:, 4:], past_key_values=out.past_key_values)  # the memory is in there
    torch.testing.assert_close(out.logits, expected[:, 4:], **CLOSE)


def test_embeddings_stand_for_tokens():
    rows, memory = ids(2, 5), written()
    embeddings = model().get_input_embeddings()(rows)
    assert embeddings.shape[-1] == WIDTH
    found = model()(memory=memory, inputs_embeds=embeddings)
    torch.testing.assert_close(found.logits, model()(memory=memory, input_ids=rows).logits, **CLOSE)


def test_hidden_states_and_attentions_are_given_on_request():
    one = copy.deepcopy(model())
    one.set_attn_implementation("eager")
    out = one(memory=written(), input_ids=ids(2, 5), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    logits = one.get_output_embeddings()(out.hidden_states[-1][:, -5:])
    torch.testing.assert_close(logits, out.logits, **CLOSE)


def test_adapters_of_the_write_are_not_there_for_reading():
    one, inputs = build("write LoRA"), rows_of(batch())
    memory = one.write(*pad(contexts()))
    logits, mem = one(memory=memory, **inputs).logits, memory.mem
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    assert torch.equal(one(memory=memory, **inputs).logits, logits)
    assert not torch.allclose(one.write(*pad(contexts())).mem, mem)


def assert_along(found, expected):
    for name, grad in found.items():
        assert F.cosine_similarity(grad.float().flatten(), expected[name].flatten(), dim=0) > 0.97, name


def test_a_step_in_bfloat16_is_near_to_one_in_float32():
    (loss, found), (wanted, expected) = (
        gradients(build("GPT-2, tied", kind).train(), **batch()) for kind in (torch.bfloat16, torch.float32)
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=0.01)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    assert_along(found, expected)


def test_a_step_under_autocast_is_near_to_one_in_float32():
    one = build("GPT-2, tied", torch.float32).train()
    wanted, expected = gradients(one, **batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = one(**batch()).loss
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=0.01)
    assert_along({name: p.grad for name, p in one.named_parameters()}, expected)
