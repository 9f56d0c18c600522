"""The factors against brute force: raw inputs times Aᵀ, raw output gradients times B."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools import GritController
from hf_gradtools.grit.fisher import RankFisher, fold
from tests.grit.reference import adapted, base_model, batch, brute_force, gap, rows


def measured(model, inputs, dtype=None, parts=1, **options):
    """Factors after one backward pass (in `parts` micro-batches), with nothing done to the model."""
    model = copy.deepcopy(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller = GritController(model, optimizer, **options)
    with controller:
        for i in range(parts):
            piece = {k: v.chunk(parts)[i] if v.ndim else v for k, v in inputs.items()}
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = model(**piece).loss
            (loss if "num_items_in_batch" in inputs else loss / parts).backward()
        controller.precondition()
    return controller


def check(model, inputs, controller, tolerance, **reference):
    for layer in model.base_model.layers():
        expected, tokens = brute_force(model, layer, inputs, **reference)
        fisher = controller.fishers[layer.name]
        assert fisher.samples == tokens, layer.name
        for mine, wanted, side in zip(fisher.factors, expected, "ag", strict=True):
            assert gap(mine, wanted) < tolerance, (layer.name, side)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("padded", [False, True])
def test_statistics_of_each_kind_of_model(kind, padded):
    model = adapted(kind)
    inputs = batch(rows(4, padded=padded, kind=kind))
    if kind == "t5":
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    check(model, inputs, measured(model, inputs), 1e-5)


def test_float64_model_is_measured_in_float64():
    model = adapted().double()
    inputs = batch(rows(4, padded=True))
    check(model, inputs, measured(model, inputs), 1e-12)


def test_decoder_mask_comes_from_the_labels_and_cross_attention_has_the_encoders():
    model = adapted("t5")
    inputs = batch(rows(4, length=9, padded=True, kind="t5"))
    inputs["labels"] = inputs["labels"][:, :6].contiguous()
    controller = measured(model, inputs)
    shifted = torch.cat([torch.ones(4, 1), (inputs["labels"][:, :-1] != -100).float()], 1)
    for layer in model.base_model.layers():
        own = layer.name.startswith("decoder") and not layer.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        reference = {**inputs, "decoder_attention_mask": shifted.long()}
        reads = "decoder_attention_mask" if own else "attention_mask"
        _, tokens = brute_force(model, layer, reference, reads=reads)
        assert controller.fishers[layer.name].samples == tokens, layer.name


def test_padding_rows_would_matter():
    model, inputs = adapted(), batch(rows(4, padded=True))
    everything = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    layer = model.base_model.layers()[-1]
    ours = measured(model, inputs).fishers[layer.name].factors[0]
    assert gap(ours, brute_force(model, layer, everything)[0][0]) > 1e-2


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"lora_bias": False}])
def test_variants(options):
    model = adapted(**options)
    inputs = batch(rows(4))
    controller = measured(model, inputs)
    for layer in model.base_model.layers():
        expected, _ = brute_force(model, layer, inputs)
        assert gap(controller.fishers[layer.name].factors[0], expected[0]) < 1e-5
        if not options.get("use_dora"):  # DoRA's output gradient is rescaled on its way to B
            assert gap(controller.fishers[layer.name].factors[1], expected[1]) < 1e-5


def test_dora_gradient_factor():
    """Against the gradient of B: it is a sum of outer products with the same gradients."""
    model = adapted(use_dora=True)
    inputs = batch(rows(2, length=2))  # one label token per row
    seen = {}
    twin = copy.deepcopy(model).train()
    layer = twin.base_model.layers()[4]
    layer.down.register_forward_hook(lambda m, a, out: out.register_hook(lambda g: seen.__setitem__("b", g)) and None)
    twin(**inputs).loss.backward()
    b = seen["b"].flatten(0, 1) * 2
    expected = b.mT @ b / len(b)
    assert gap(measured(model, inputs).fishers[layer.name].factors[1], expected) < 1e-5


@pytest.mark.parametrize("with_count", [False, True])
def test_accumulation_counts_like_one_batch(with_count):
    """With the count of label tokens exactly; micro-batches of equal counts without it, too."""
    model, inputs = adapted(), batch(rows(6, padded=with_count))
    if with_count:
        inputs["num_items_in_batch"] = (inputs["labels"][:, 1:] != -100).sum()
    whole = measured(model, inputs)
    parts = measured(model, inputs, parts=3, accumulation_steps=3)
    for name, fisher in whole.fishers.items():
        assert fisher.samples == parts.fishers[name].samples
        assert gap(parts.fishers[name].factors, fisher.factors) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    inputs = batch(rows(4, padded=True))
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    controller = measured(model, inputs)
    check(adapted(), inputs, controller, 1e-5)


def test_dropout_is_part_of_the_activations():
    model, inputs = adapted(lora_dropout=0.3), batch(rows(4))
    torch.manual_seed(5)
    controller = measured(model, inputs)
    torch.manual_seed(5)
    twin, seen = copy.deepcopy(model).train(), {}
    layer = twin.base_model.layers()[3]
    layer.down.register_forward_hook(lambda module, args, out: seen.__setitem__("a", out.detach().flatten(0, 1)))
    twin(**inputs)
    expected = seen["a"].mT @ seen["a"] / len(seen["a"])
    assert gap(controller.fishers[layer.name].factors[0], expected) < 1e-6


def test_bf16_autocast_is_summed_in_float32():
    """Exactly what passes by in bfloat16, in sums that lose nothing; and that is near the float64 model's."""
    model, inputs = adapted(), batch(rows(4, padded=True))
    controller = measured(model, inputs, dtype=torch.bfloat16)
    check(model, inputs, controller, 0.1)
    twin, seen = copy.deepcopy(model).train(), {}

    def keep(name, module, args, output):
        seen[name] = [output.detach()]
        output.register_hook(seen[name].append)

    for layer in twin.base_model.layers():
        layer.down.register_forward_hook(partial(keep, layer.name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = twin(**inputs).loss
    loss.backward()
    real, labels = inputs["attention_mask"].flatten().bool(), (inputs["labels"][:, 1:] != -100).sum()
    for name, (a, b) in seen.items():
        assert a.dtype == b.dtype == torch.bfloat16
        assert controller.fishers[name].average.dtype == torch.float32
        a, b = a.flatten(0, 1)[real].double(), b.flatten(0, 1)[real].double() * labels
        expected = torch.stack([a.mT @ a, b.mT @ b]) / real.sum()
        for mine, wanted in zip(controller.fishers[name].factors, expected, strict=True):
            assert gap(mine, wanted) < 1e-5


def test_half_precision_adapter_has_nonzero_gradient_factor():
    """In half precision the products of mean-loss gradients underflow to zero."""
    model, inputs = adapted().to(torch.bfloat16), batch(rows(4))
    controller = measured(model, inputs)
    for layer in model.base_model.layers():
        expected, _ = brute_force(model, layer, inputs, dtype=torch.float32)
        assert gap(controller.fishers[layer.name].factors[1], expected[1]) < 0.1


def test_loss_scale_is_removed():
    model, inputs = adapted().train(), batch(rows(4))
    plain = measured(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model, optimizer, grad_scale=lambda: 2.0**16) as scaled:
        (2.0**16 * model(**inputs).loss).backward()
        optimizer.step()
    for name, fisher in plain.fishers.items():
        assert gap(scaled.fishers[name].factors, fisher.factors) < 1e-5


def test_evaluation_disabled_and_merged_adapters_are_not_measured():
    model, inputs = adapted(), batch(rows(4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model, optimizer) as controller:
        model.eval()
        model(**inputs)
        model(**inputs).loss.backward()
        model.train()
        with torch.no_grad():
            model(**inputs)
        with model.disable_adapter():
            model(**inputs)
        model.merge_adapter()
        model(**inputs)
        model.unmerge_adapter()
        assert all(not fisher.tokens for fisher in controller.fishers.values())


def test_ema_is_bias_corrected_and_mean_is_a_mean():
    model, inputs = adapted(), batch(rows(4))
    averages = {}
    for statistics in ("ema", "mean"):
        model.peft_config["default"].statistics = statistics
        model.peft_config["default"].grit_cov_update_freq = 1
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with GritController(model, optimizer) as controller:
            model.train()
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        averages[statistics] = controller.fishers
    for name, fisher in averages["ema"].items():
        torch.testing.assert_close(fisher.factors, averages["mean"][name].factors)
        assert averages["mean"][name].samples == 120


def test_non_finite_sums_are_dropped_and_counted():
    model, inputs = adapted(), batch(rows(4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model, optimizer) as controller:
        model.train()
        (model(**inputs).loss * float("inf")).backward()
        controller.precondition()
    assert controller.skipped_sums == len(controller.layers)
    assert all(not fisher.average.any() for fisher in controller.fishers.values())


def test_overflow_step_leaves_no_trace():
    """The step of a fused optimizer is called on overflow, and skips itself; a plain one's is not called at all."""
    model, inputs = adapted(), batch(rows(4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    with GritController(model, optimizer) as controller:
        model.train()
        model(**inputs).loss.backward()
        controller.begin_step()
        assert all(not fisher.tokens for fisher in controller.fishers.values())
        model(**inputs).loss.backward()
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        assert all(not fisher.weight and not fisher.tokens for fisher in controller.fishers.values())


def test_statistics_are_taken_every_so_many_steps():
    model, inputs = adapted(grit_cov_update_freq=3), batch(rows(4))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model, optimizer) as controller:
        model.train()
        samples = []
        for _ in range(7):
            model(**inputs).loss.backward()
            optimizer.step()
            samples.append(controller.fishers["model.layers.0.self_attn.q_proj"].samples)
    assert samples == [40, 40, 40, 80, 80, 80, 120]


def test_packed_rows_without_mask_all_count():
    model, inputs = adapted(), batch(rows(4))
    del inputs["attention_mask"]
    controller = measured(model, inputs)
    assert {fisher.samples for fisher in controller.fishers.values()} == {40}


def test_unused_base_stays_unhooked_after_detach():
    base = base_model()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    model = adapted(base=base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with GritController(model, optimizer):
        pass
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 20), steps=st.integers(1, 4), mean=st.booleans())
@settings(max_examples=30, deadline=None)
def test_factors_are_symmetric_and_positive(seed, tokens, steps, mean):
    generator = torch.Generator().manual_seed(seed)
    fisher = RankFisher(torch.empty(5, 7))
    for _ in range(steps):
        a, b = torch.randn(2, 1, tokens, 5, generator=generator)
        mask = torch.rand(tokens, generator=generator) < 0.7
        fisher.add(a, 1e-4 * b, mask, 3.0)
        fold([fisher], None if mean else 0.9)
    values = torch.linalg.eigvalsh(fisher.factors.double())
    # An entry may be the difference of large products: symmetric to rounding means in units of the whole matrix.
    asymmetry = (fisher.factors - fisher.factors.mT).abs().amax((-2, -1))
    assert (asymmetry <= 1e-6 * fisher.factors.abs().amax((-2, -1))).all()
    assert (values >= -1e-6 * values.amax(-1, keepdim=True).clamp_min(1e-30)).all()


def test_positional_arguments_are_read_too():
    model, inputs = adapted(), batch(rows(4, padded=True))
    by_name = measured(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with GritController(model.train(), optimizer) as controller:
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        model.base_model(ids, mask, labels=labels).loss.backward()
        controller.precondition()
    for name, fisher in controller.fishers.items():
        assert torch.equal(fisher.factors, by_name.fishers[name].factors)
