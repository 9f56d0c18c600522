"""Gradients: those of finite differences, those with checkpointing, second ones, and what five steps do with them."""

import copy
import gc

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.bare_nanogpt import BareConfig, BareNanoGPT, LoopOptions, training_steps
from hf_gradtools.nanogpt import NanoGPTForCausalLM
from tests.nanogpt.tiny import CASES, MIXING, build, config, ids, model, rounds


def as_function(one):
    """Hidden states as a function of embeddings and all parameters."""
    names = list(dict(one.named_parameters()))

    def run(embeddings, *values):
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(one, named, (), {"inputs_embeds": embeddings}).last_hidden_state

    return run, [torch.randn(1, 4, one.config.n_embd, dtype=torch.float64, requires_grad=True), *one.parameters()]


@pytest.mark.parametrize("case", [case for case in CASES if not rounds(case)])
def test_gradients_are_those_of_finite_differences(case):
    run, inputs = as_function(build(case).transformer)
    assert gradcheck(run, inputs, fast_mode=True, nondet_tol=1e-12, check_undefined_grad=False)


def gradients(one, reentrant=None):
    one = copy.deepcopy(one).train()
    if reentrant is not None:
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    one(ids(2, 6), labels=ids(2, 6), use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in one.named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames the methods of checkpointing
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("case", MIXING)
def test_checkpointing_changes_no_gradient(case, reentrant):
    expected, found = gradients(model(case)), gradients(model(case), reentrant)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_repeats_the_same_dropout():
    one = build(dropout=0.3)
    found = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        found.append(gradients(one, reentrant))
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", ["default", "lobo per head", "window", "all positions", "ssm in turn", "mlp=swiglu"])
def test_second_gradients_are_those_of_finite_differences(case):
    one = build(case).transformer
    run, inputs = as_function(one)
    with one.second_order():
        assert gradgradcheck(run, inputs[:1] + [p.detach() for p in inputs[1:]], fast_mode=True)


def test_the_switch_to_second_gradients_ends_with_its_block():
    one = build("default")
    loss = one(ids(1, 4), labels=ids(1, 4)).loss
    with one.second_order():
        inside = one(ids(1, 4), labels=ids(1, 4)).loss
    torch.testing.assert_close(inside, loss)
    first = torch.autograd.grad(inside, one.transformer.wte.weight, create_graph=True)[0]
    first.square().sum().backward()
    assert one.transformer.wte.weight.grad.abs().max() > 0
    first = torch.autograd.grad(loss, one.transformer.wte.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="not implemented|derivative"):
        first.square().sum().backward()


@pytest.fixture(scope="module")
def nothing_old_to_collect():
    """Trainer collects garbage when it ends, which takes most of a second over all that the libraries have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = ids(9)
        return {"input_ids": row[:-1], "shift_labels": row[1:]}


@pytest.mark.usefixtures("nothing_old_to_collect")
@pytest.mark.parametrize("case", MIXING)
def test_a_few_steps_of_trainer_lower_the_loss_and_print_nothing(case, tmp_path, capfd):
    torch.manual_seed(0)
    one = NanoGPTForCausalLM(config(case))
    args = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=2, learning_rate=3e-3, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", label_names=["shift_labels"],
    )  # fmt: skip
    trainer = Trainer(one, args, train_dataset=Rows())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_weights_and_batches_give_the_losses_of_the_bare_nanogpt(bias, tmp_path):
    sizes = {"vocab_size": 19, "n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": 8}
    bare = BareNanoGPT(BareConfig(**sizes, bias=bias)).double()
    torch.save(bare.checkpoint(), tmp_path / "ckpt.pt")
    ours = NanoGPTForCausalLM.from_nanogpt(tmp_path / "ckpt.pt")
    tokens, options = ids(400).numpy(), LoopOptions(batch_size=3, warmup_steps=2, log_every_steps=1)
    torch.manual_seed(0)
    expected = list(training_steps(bare, tokens, options, 12))
    torch.manual_seed(0)
    found = list(training_steps(ours, tokens, options, 12, lambda m, x, y: m(x, shift_labels=y).loss, 8))
    assert found == pytest.approx(expected, abs=1e-6)  # the loss is taken in single precision
    assert expected[-1] != pytest.approx(expected[0], abs=1e-3)


def test_the_targets_of_nanogpt_count_the_last_position_and_labels_do_not():
    row = ids(2, 9)
    with torch.no_grad():
        logits = model()(row[:, :-1]).logits
        by_shift = model()(row[:, :-1], shift_labels=row[:, 1:]).loss
        by_label = model()(row[:, :-1], labels=row[:, :-1]).loss
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="none")
    torch.testing.assert_close(by_shift, each.mean(), check_dtype=False)
    torch.testing.assert_close(by_label, each[:, :-1].mean(), check_dtype=False)


def test_the_loss_leaves_out_minus_100_and_divides_by_the_items_of_the_step():
    row, target = ids(1, 6), ids(1, 6, seed=1)
    target[0, :4] = -100
    with torch.no_grad():
        logits = model()(row).logits
        mean = model()(row, shift_labels=target).loss
        part = model()(row, shift_labels=target, num_items_in_batch=8).loss
    each = torch.nn.functional.cross_entropy(logits[0, 4:], target[0, 4:], reduction="none")
    torch.testing.assert_close(mean, each.mean(), check_dtype=False)
    torch.testing.assert_close(part, each.sum() / 8, check_dtype=False)
