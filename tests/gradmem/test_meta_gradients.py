"""Gradients through the write: those of the definition, of finite differences, and of each mode's formula."""

import copy
from itertools import product

import pytest
import torch

from tests.gradmem.tiny import CASES, batch, contexts, gap, gradients, model, queries, reference, with_options


ROUNDS = list(product(CASES, (1, 2, 3)))
PLAIN_MEMORY = ["default", "both clips", "projection", "write head", "control tokens", "GPT-2, tied", "write LoRA"]


def defined(one, steps=None, each=2):
    """Loss and gradients of the definition."""
    definition = reference(one)
    loss = definition.loss(contexts(), queries(each), steps=steps)
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in definition.values.items()}


def assert_same(found, expected, rtol=1e-7):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or found[name] is None:
            assert value is found[name], name
        else:
            torch.testing.assert_close(
                found[name], value, rtol=rtol, atol=1e-2 * rtol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("case", "steps"), ROUNDS)
def test_loss_and_gradients_are_those_of_the_definition(case, steps):
    one = model(case)
    (expected, wanted), (loss, found) = defined(one, steps), gradients(one, K=steps, **batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    assert_same(found, wanted)


@pytest.mark.parametrize("each", [1, 3])
def test_any_number_of_queries_to_a_context(each):
    expected, wanted = defined(model(), each=each)
    loss, found = gradients(model(), **batch(each))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    assert_same(found, wanted)


@torch.no_grad()
def slope(one, directions, inputs, step=1e-7):
    """Central difference of the loss along a direction of the parameters."""
    other, losses = copy.deepcopy(one), []
    for by in (step, -step):
        for name, direction in directions.items():
            other.get_parameter(name).copy_(one.get_parameter(name) + by * direction)
        losses.append(other(**inputs).loss.item())
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize(("case", "steps"), ROUNDS)
def test_second_order_is_the_slope_of_finite_differences(case, steps):
    one, inputs = model(case), {**batch(1), "K": steps}
    _, grads = gradients(one, **inputs)
    # Along the gradient of all parameters and along that of the memory: the slope is its length, and no part is lost
    # among larger ones.
    for names in (list(grads), ["mem"]):
        length = torch.stack([grads[name].norm() for name in names]).norm()
        found = slope(one, {name: grads[name] / length for name in names}, inputs)
        assert found == pytest.approx(length.item(), rel=1e-5), names


def test_the_gradient_of_each_parameter_is_that_of_finite_differences():
    one, inputs = model("everything"), batch(1)
    _, grads = gradients(one, **inputs)
    for name, grad in grads.items():
        found = slope(one, {name: grad / grad.norm()}, inputs)
        assert found == pytest.approx(grad.norm().item(), rel=1e-5), name


@pytest.mark.parametrize("case", [case for case in CASES if "clip" in case and "out of reach" not in case])
def test_the_clips_of_these_cases_do_cut(case):
    one = model(case)
    value, norm = one.config.inner_clip_value, one.config.inner_clip_norm
    for context in contexts():
        for grads in reference(one).write(context).grads:
            for grad in grads.values():
                if value is not None:
                    assert grad.abs().min() < value < grad.abs().max()
                    grad = grad.clamp(-value, value)
                assert norm is None or grad.norm() > norm


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["first", "none"])
def test_modes_without_second_order_are_those_of_the_definition(case, mode):
    one = with_options(model(case), grad_mode=mode)
    (expected, wanted), (loss, found) = defined(one), gradients(one, **batch())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-8)
    assert_same(found, wanted)


@pytest.mark.parametrize("case", PLAIN_MEMORY)
def test_first_order_is_straight_through(case):
    one, inputs = with_options(model(case), grad_mode="first"), batch()
    _, found = gradients(one, **inputs)
    one = copy.deepcopy(one)
    memory = one.write(inputs.pop("context_ids"), inputs.pop("context_attention_mask"))
    memory.mem.requires_grad_()
    one(memory=memory, **inputs).loss.backward()
    assert_same({"mem": found.pop("mem")}, {"mem": memory.mem.grad.sum(0)})  # d mem_K / d mem_0 is the identity
    expected = {name: p.grad for name, p in one.named_parameters() if name != "mem"}
    for name in (name for name, grad in expected.items() if grad is None):  # what only the write has used
        assert found[name] is None or not found[name].any(), name
        expected[name] = found[name]
    assert_same(found, expected)


@pytest.mark.parametrize("case", PLAIN_MEMORY)
def test_none_is_first_order_without_gradient_of_the_memory(case):
    _, first = gradients(with_options(model(case), grad_mode="first"), **batch())
    _, none = gradients(with_options(model(case), grad_mode="none"), **batch())
    assert none.pop("mem") is None
    assert first.pop("mem").any()
    assert_same(none, first)


@pytest.mark.parametrize(
    "case", ["default", "own projections, both clips", "Adam", "write LoRA", "inner loss added", "everything"]
)
def test_second_order_through_the_last_steps(case):
    one = model(case)
    found = {last: gradients(with_options(one, last_k_second_order=last), K=3, **batch())[1] for last in range(4)}
    assert_same(found[3], gradients(one, K=3, **batch())[1], rtol=1e-10)
    assert_same(found[0], gradients(with_options(one, grad_mode="first"), K=3, **batch())[1], rtol=1e-10)
    for last in (1, 2):
        assert_same(found[last], defined(with_options(one, last_k_second_order=last), 3)[1])
        assert gap(found[last]["mem"], found[last - 1]["mem"]) > 1e-3  # each further step does tell


@pytest.mark.parametrize("case", ["default", "GPT-2, tied", "write head", "write LoRA"])
def test_a_frozen_backbone_changes_no_other_gradient(case):
    _, all_of_them = gradients(model(case), **batch())
    frozen = with_options(model(case), freeze_backbone=True)
    _, found = gradients(frozen, **batch())
    for name, grad in found.items():
        if name.startswith("backbone.") and "lora_" not in name:
            assert grad is None, name
            assert not frozen.get_parameter(name).requires_grad, name
        else:
            torch.testing.assert_close(grad, all_of_them[name], rtol=1e-10, atol=1e-12)


def test_no_step_is_a_memory_as_it_starts():
    _, found = gradients(model(), K=0, **batch())
    _, expected = defined(model(), 0)
    assert_same(found, expected)


def test_inner_losses_are_given_before_each_step():
    out = model()(K=3, **batch())
    definition = reference(model())
    for row, context in zip(out.inner_losses, contexts(), strict=True):
        expected = torch.stack(definition.write(context, steps=3).losses)
        torch.testing.assert_close(row, expected.detach(), rtol=1e-8, atol=0, check_dtype=False)
    assert not out.inner_losses.requires_grad


def test_the_inner_loss_is_added_with_its_weight():
    one, inputs = model(), batch()
    bare = one(**inputs)
    added = with_options(one, add_inner_loss_to_outer=True, inner_loss_weight=0.3)(**inputs)
    expected = bare.loss + 0.3 * bare.inner_losses[:, -1].mean()
    torch.testing.assert_close(added.loss, expected, rtol=1e-8, atol=0)
