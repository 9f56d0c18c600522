"""Writing: the memories of the definition, for each sample its own, and nothing else in the model is touched."""

import copy

import pytest
import torch

from tests.gradmem.references import Written
from tests.gradmem.tiny import CASES, build, contexts, gap, ids, model, pad, reference


CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def states(memory):
    """Of each sample its tensors, in the definition's names."""
    found = {"mem": memory.mem, "weight": memory.proj_weight, "bias": memory.proj_bias}
    return [{n: value[row] for n, value in found.items() if value is not None} for row in range(len(memory))]


def assert_written(memory, expected: list[Written]):
    assert len(memory) == len(expected)
    for found, done in zip(states(memory), expected, strict=True):
        assert found.keys() == done.state.keys()
        for name, value in done.state.items():
            torch.testing.assert_close(found[name], value.detach(), **CLOSE)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_write_is_that_of_the_definition(case, steps):
    memory = model(case).write(*pad(contexts()), K=steps)
    definition = reference(model(case))
    assert_written(memory, [definition.write(context, steps=steps) for context in contexts()])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_a_sample_alone_has_the_memory_it_has_in_a_ragged_batch(case, side):
    rows = [*contexts(), ids(1, seed=5)]
    together = model(case).write(*pad(rows, side))
    for row, context in enumerate(rows):
        alone = states(model(case).write(context[None]))[0]
        for name, value in states(together)[row].items():
            torch.testing.assert_close(value, alone[name], **CLOSE)


def test_what_is_behind_the_padding_does_not_matter():
    padded, mask = pad(contexts())
    expected = model().write(padded, mask).mem
    torch.testing.assert_close(model().write(torch.where(mask.bool(), padded, 7), mask).mem, expected, rtol=0, atol=0)
    wider = torch.nn.functional.pad(padded, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
    torch.testing.assert_close(model().write(*wider).mem, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_a_second_write_continues_the_first(case):
    first, second = contexts()
    one, definition = model(case), reference(model(case))
    memory = one.write(second[None], memory=one.write(first[None]), K=3)
    expected = definition.write(second, definition.write(first).state, steps=3)
    assert_written(memory, [expected])


def test_a_memory_of_several_rows_is_continued_row_by_row():
    one = model("own projections")
    memory = one.write(*pad(contexts()))
    again = one.write(*pad(contexts()[::-1]), memory=memory)
    for row, context in enumerate(contexts()[::-1]):
        alone = one.write(context[None], memory=memory[row])
        torch.testing.assert_close(states(again)[row], states(alone)[0], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_inner_loss_is_that_of_the_definition(case):
    one, definition = model(case), reference(model(case))
    padded = pad(contexts())
    expected = [definition.inner_loss(definition.start(), context) for context in contexts()]
    torch.testing.assert_close(one.inner_loss(*padded), torch.stack(expected), check_dtype=False, **CLOSE)
    written = [definition.inner_loss(definition.write(context).state, context) for context in contexts()]
    found = one.inner_loss(*padded, memory=one.write(*padded))
    torch.testing.assert_close(found, torch.stack(written), check_dtype=False, **CLOSE)


def test_writing_lowers_the_loss_of_the_context():
    one = build("GPT-2, tied", inner_lr=0.1)
    padded, losses = pad(contexts()), []
    for steps in (0, 2, 8):
        losses.append(one.inner_loss(*padded, memory=one.write(*padded, K=steps)))
    assert (losses[0] > losses[1]).all()
    assert (losses[1] > losses[2]).all()


SETTINGS = {"as it is": torch.enable_grad, "no_grad": torch.no_grad}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", ["default", "everything"])
def test_a_write_touches_no_parameter(case, setting, training):
    one = copy.deepcopy(model(case)).train(training)
    frozen = [p for index, p in enumerate(one.parameters()) if index % 3 == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in one.named_parameters()}
    with SETTINGS[setting]():
        memory = one.write(*pad(contexts()))
        assert torch.is_grad_enabled() == (setting == "as it is")
    assert one.training == training
    assert not memory.mem.requires_grad
    for name, parameter in one.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name][0]), name
        assert parameter.requires_grad == before[name][1], name
    expected = model(case).write(*pad(contexts()))
    torch.testing.assert_close(states(memory), states(expected), rtol=0, atol=0)


def test_gradients_that_are_there_stay_as_they_are():
    one = copy.deepcopy(model())
    for parameter in one.parameters():
        parameter.grad = torch.ones_like(parameter)
    one.write(*pad(contexts()))
    assert all((p.grad == 1).all() for p in one.parameters())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["done", "interrupted"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_write_leaves_the_backbone_set_as_it_was(implementation, fails):
    one = copy.deepcopy(model("write LoRA"))
    one.set_attn_implementation(implementation)
    one.backbone.get_input_embeddings().weight.requires_grad_(False)
    flags = [p.requires_grad for p in one.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.modules()]
    reading = {"input_ids": ids(2, 4), "memory": model("write LoRA").write(*pad(contexts()))}
    expected = one(**reading).logits

    def interrupt(*_):
        raise Interrupted

    if fails:
        handle = one.backbone.get_output_embeddings().register_forward_pre_hook(interrupt)
        layer = list(one.backbone.modules())[-2].register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            one.write(*pad(contexts()))
        handle.remove()
        layer.remove()
    else:
        one.write(*pad(contexts()))
    assert [p.requires_grad for p in one.parameters()] == flags
    assert one.backbone.config._attn_implementation == implementation
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.modules()] == hooks
    assert torch.equal(one(**reading).logits, expected)  # LoRA is off again, too


def test_the_steps_are_those_of_the_configuration_unless_given():
    padded = pad(contexts())
    torch.testing.assert_close(build(K=3).write(*padded).mem, build(K=1).write(*padded, K=3).mem, rtol=0, atol=0)


@torch.no_grad()
def test_writing_in_bfloat16_is_near_to_writing_in_float32():
    rows = pad(contexts())
    start, found, expected = (
        build("GPT-2, tied", kind, inner_lr=0.5).write(*rows, K=steps).mem.float()
        for kind, steps in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float32, 1))
    )
    assert gap(found - start, expected - start) < 0.1
