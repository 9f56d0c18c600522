"""Steps that are computed again in the backward pass: the same gradients, with dropout too, in memory flat in K."""

import copy
from itertools import product

import pytest
import torch

from benchmarks.common import peak_bytes
from tests.gradmem.test_meta_gradients import assert_same, slope
from tests.gradmem.tiny import CASES, batch, build, gap, gradients, ids, model, with_options


DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
MODES = {
    "second": {},
    "last step": {"last_k_second_order": 1},
    "last two": {"last_k_second_order": 2},
    "first": {"grad_mode": "first"},
    "none": {"grad_mode": "none"},
}


def with_and_without(one, inputs, seed=0):
    """Loss and gradients of one call, recomputed and kept."""
    found = []
    for recompute in (True, False):
        torch.manual_seed(seed)
        found.append(gradients(with_options(one, recompute_write=recompute), **inputs))
    return found


@pytest.mark.parametrize(
    ("case", "mode"), [*((case, "second") for case in CASES), *product(["default", "everything"], list(MODES)[1:])]
)
def test_recomputed_steps_give_the_gradients_of_kept_ones(case, mode):
    one = with_options(model(case), **MODES[mode])
    (loss, found), (kept_loss, kept) = with_and_without(one, {"K": 3, **batch()})
    assert loss.item() == pytest.approx(kept_loss.item(), rel=1e-12)
    assert_near(found, kept)


def assert_near(found, expected):
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or not value.any() or gap(found[name], value) < 1e-10, name


def with_dropout():
    return build("everything", backbone_fields=DROPOUT, write_lora_dropout=0.2).train()


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_steps_drop_what_they_dropped_before(mode):
    one = with_options(with_dropout(), **MODES[mode])
    (loss, found), (kept_loss, kept) = with_and_without(one, {"K": 3, **batch()})
    assert loss.item() == pytest.approx(kept_loss.item(), rel=1e-12)
    assert_near(found, kept)
    other, _ = with_and_without(one, {"K": 3, **batch()}, seed=1)
    assert other[0].item() != pytest.approx(loss.item(), rel=1e-3)  # there is something to drop


@pytest.mark.parametrize("recompute", [True, False])
def test_with_dropout_the_gradient_is_that_of_finite_differences(recompute):
    one, inputs = with_options(with_dropout(), recompute_write=recompute), batch(1)

    def seeded(module, args, kwargs):
        torch.manual_seed(0)

    one.register_forward_pre_hook(seeded, with_kwargs=True)
    _, grads = gradients(one, **inputs)
    for names in (list(grads), ["mem"]):
        length = torch.stack([grads[name].norm() for name in names]).norm()
        found = slope(one, {name: grads[name] / length for name in names}, inputs)
        assert found == pytest.approx(length.item(), rel=1e-5)


def test_recomputed_steps_are_cast_as_they_were():
    found = []
    for recompute in (True, False):
        one = build("GPT-2, tied", torch.float32, K=3, recompute_write=recompute).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = one(**batch()).loss
        loss.backward()  # outside of it
        found.append({name: p.grad for name, p in one.named_parameters()})
    for name, grad in found[1].items():
        assert gap(found[0][name], grad) < 0.01, name  # one adds up in bfloat16, the other in float32


def test_the_backward_pass_leaves_the_random_numbers_as_it_found_them():
    one = with_dropout()
    loss = one(K=3, **batch()).loss
    expected = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames the methods of checkpointing
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("case", ["default", "everything"])
def test_checkpointing_of_the_backbone_changes_no_gradient(case, reentrant):
    one = copy.deepcopy(model(case)).train()
    one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    _, found = gradients(one, **batch())
    assert_same(found, gradients(copy.deepcopy(model(case)).train(), **batch())[1], rtol=1e-10)


def test_gradients_add_up_over_two_backward_passes():
    one = copy.deepcopy(model())
    for _ in range(2):
        one(**batch()).loss.backward()
    _, once = gradients(model(), **batch())
    assert_same({name: p.grad for name, p in one.named_parameters()}, {n: 2 * g for n, g in once.items()}, rtol=1e-10)


def peak(steps, **fields):
    """Largest sum of live bytes in one step of training, without the gradients that it leaves."""
    wide = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 64, "max_position_embeddings": 128}
    one = build(dtype=torch.float32, backbone_fields=wide, inner_lr=0.1, **fields).train()
    rows = {"context_ids": ids(8, 96), "input_ids": ids(8, 6), "labels": ids(8, 6), "K": steps}
    for parameter in one.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return peak_bytes(lambda: one(**rows).loss.backward())[0]


@pytest.mark.parametrize("case", [{}, {"use_adam": True}], ids=["SGD", "Adam"])
def test_peak_memory_does_not_grow_with_the_steps(case):
    assert peak(8, **case) <= 1.2 * peak(1, **case)


def test_peak_memory_grows_where_nothing_is_recomputed():
    assert peak(8, recompute_write=False) > 3 * peak(1, recompute_write=False)
