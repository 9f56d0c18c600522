"""Cutting an adapter: what is lost, what stays the same, and how training goes on."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradtools import GritController
from hf_gradtools.core.curvature import energies
from hf_gradtools.grit.moments import change_basis
from tests.grit.reference import adapted, batch, gap, rows


DATA = rows(32, padded=True)


def start(model, optimizer=torch.optim.AdamW, **options):
    model.train()
    torch.manual_seed(0)
    return GritController(model, optimizer([p for p in model.parameters() if p.requires_grad], **options))


def steps(controller, model, count, first=0):
    losses = []
    for i in range(first, first + count):
        loss = model(**batch(DATA, 8 * (i % 4), 8 * (i % 4) + 8)).loss
        loss.backward()
        controller.optimizer.step()
        controller.optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def trained(count=40, optimizer=torch.optim.AdamW, lr=5e-3, **options):
    """A trained adapter with real statistics, ready to be cut."""
    options = {"reprojection_freq": 10_000, "grit_cov_update_freq": 1, "kfac_update_freq": 5, **options}
    model = adapted(trained=False, **options)
    controller = start(model, optimizer, lr=lr)
    controller.attach()
    steps(controller, model, count)
    return model, controller


@torch.no_grad()
def evaluate(model):
    model.eval()
    loss = float(model(**batch(DATA)).loss)
    model.train()
    return loss


@torch.no_grad()
def logits(model):
    model.eval()
    values = model(input_ids=torch.tensor(DATA["input_ids"])).logits
    model.train()
    return values


@pytest.fixture(scope="module")
def learnt():
    return trained(count=60)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_balanced_loses_least(learnt, rank):
    """Eval loss after cutting all layers of a trained adapter: the balanced cut never loses more than the others."""
    losses, before = {}, evaluate(learnt[0])
    for method in ("balanced", "one_sided", "two_sided"):
        model, controller = copy.deepcopy(learnt)
        controller.config.reprojection = method
        controller.cut(rank)
        assert set(model.base_model.ranks().values()) == {rank}
        losses[method] = evaluate(model) - before
    assert losses["balanced"] <= losses["two_sided"]
    assert losses["balanced"] <= losses["one_sided"] + 1e-4


def test_cut_to_the_numerical_rank_changes_nothing():
    model, controller = trained(count=10)
    for layer in controller.layers:  # rank 3 in 6 coordinates, none of them along an axis
        mix = torch.eye(6) + 0.2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
        keep = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]))
        layer.A.data = mix @ keep @ torch.linalg.inv(mix) @ layer.A.data
        layer.B.data = layer.B.data @ mix @ keep @ torch.linalg.inv(mix)
    for fisher in controller.fishers.values():
        fisher.average.zero_()
        fisher.weight = 0.0
    steps(controller, model, 0)
    controller.optimizer.param_groups[0]["lr"] = 0.0
    controller._collecting = True
    steps(controller, model, 1)
    before = logits(model)
    controller.cut(3)
    assert set(model.base_model.ranks().values()) == {3}
    assert gap(logits(model), before) < 1e-5


def test_statistics_after_the_cut_are_those_that_would_be_measured():
    """Through the same tokens, in float64: `left Σ_a leftᵀ` and `rightᵀ Σ_g right`, and both are diagonal."""
    model = adapted(grit_cov_update_freq=1, ema_decay=0.0, reprojection_freq=10_000, preconditioner=None).double()
    controller = start(model, torch.optim.SGD, lr=0.0)
    controller.attach()
    steps(controller, model, 1)
    controller.cut(6 - 1)
    after = {name: fisher.factors.clone() for name, fisher in controller.fishers.items()}
    layer = controller.layers[-1]  # the last layer: cutting the others changes what reaches it, cutting itself too
    assert gap(after[layer.name][0], torch.diag_embed(after[layer.name][0].diagonal())) < 1e-10
    assert gap(after[layer.name][1], torch.diag_embed(after[layer.name][1].diagonal())) < 1e-10
    seen = {}
    x = torch.randn(50, layer.A.shape[1]).double()
    g = torch.randn(50, layer.B.shape[0]).double()
    scale = layer.module.scaling["default"]
    seen["before"] = (x @ layer.A.mT, scale * g @ layer.B)
    fisher = controller.fishers[layer.name]
    fisher.average = torch.stack([t.mT @ t / 50 for t in seen["before"]]).detach()
    fisher.weight = 1.0
    controller.cut(3)
    measured = torch.stack([t.mT @ t / 50 for t in (x @ layer.A.mT, scale * g @ layer.B)])
    assert gap(fisher.factors, measured) < 1e-10


def test_scale_reload_and_file(learnt, tmp_path):
    from peft import PeftModel

    model, controller = copy.deepcopy(learnt)
    model.save_pretrained(tmp_path / "whole")
    scales = {layer.name: layer.module.scaling["default"] for layer in controller.layers}
    controller.cut()
    cut_ranks = model.base_model.ranks()
    assert min(cut_ranks.values()) < 6
    assert {layer.name: layer.module.scaling["default"] for layer in controller.layers} == pytest.approx(scales)
    model.save_pretrained(tmp_path / "cut")
    sizes = [os.path.getsize(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    parameters = sum(layer.size for layer in controller.layers)
    report = model.base_model.rank_report()
    assert report["parameters"] == parameters < report["base_parameters"]
    assert sizes[0] - sizes[1] == pytest.approx(4 * (report["base_parameters"] - parameters), rel=0.05)
    base = copy.deepcopy(model).unload()
    again = PeftModel.from_pretrained(base, tmp_path / "cut")
    assert again.base_model.ranks() == cut_ranks
    assert torch.equal(logits(again), logits(model))
    assert again.base_model.rank_report() == report


@pytest.mark.parametrize("preconditioner", ["rank_soap", "kfac", None])
@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_training_goes_on_without_a_spike(preconditioner, allocation):
    """From the moment of the cut on, never more than 1 % above the same run without it."""
    losses = {}
    for is_cut in (False, True):
        model, controller = trained(40, preconditioner=preconditioner, rank_allocation=allocation)
        if is_cut:
            controller.cut()
            assert sum(controller.live_ranks.values()) <= 6 * len(controller.layers) - 8
        losses[is_cut] = []
        for step in range(10):
            losses[is_cut].append(evaluate(model))
            steps(controller, model, 1, first=step)
    assert all(cut <= 1.01 * whole for cut, whole in zip(losses[True], losses[False], strict=True))


def test_moments_after_a_cut_continue_the_old_ones(learnt):
    """First moments transform as gradients do, exactly; second moments stay positive."""
    model, controller = copy.deepcopy(learnt)
    layer = controller.layers[0]
    old_basis = controller.bases[layer.name]
    old = {k: v.clone() for k, v in controller.optimizer.state[layer.A].items()}
    old_product = layer.A.detach().clone()
    gradient_average = old_basis[1].float() @ old["exp_avg"]  # in the coordinates of A itself
    controller.cut(4)
    state = controller.optimizer.state[layer.A]
    left = layer.A.detach().double() @ torch.linalg.pinv(old_product.double())
    assert left.shape == (4, 6)
    new_average = controller.bases[layer.name][1].float() @ state["exp_avg"]
    # ∇A' = rightᵀ ∇A with left @ right = I: so leftᵀ-combinations of the new average give back its kept part.
    assert state["exp_avg"].shape == layer.A.shape == (4, 24)
    assert (state["exp_avg_sq"] >= 0).all()
    assert torch.linalg.matrix_rank(torch.cat([gradient_average, new_average]).double(), rtol=1e-4) == 6
    assert float(state["step"]) == float(old["step"])


def test_change_of_basis_is_exact_for_momentum():
    """SGD with momentum in turned coordinates takes the same path."""
    turn = torch.linalg.qr(torch.randn(4, 4).double())[0]
    target = torch.randn(4, 6).double()
    paths = []
    for turned in (False, True):
        weight = torch.nn.Parameter(torch.zeros(4, 6).double())
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        for step in range(6):
            if turned and step == 3:
                weight.data = turn @ weight.data
                change_basis(optimizer, weight, lambda m: turn @ m, lambda v: turn.square() @ v)
            goal = turn @ target if turned and step >= 3 else target
            optimizer.zero_grad()
            ((weight - goal) ** 2).sum().backward()
            optimizer.step()
        paths.append(turn.mT @ weight.detach() if turned else weight.detach())
    assert gap(paths[1], paths[0]) < 1e-12


def test_masked_and_physical_cuts_train_alike():
    """Zeros in both matrices have zero gradients: the tensors keep their shape, and the function is the same."""
    results = {}
    for mode in ("physical", "masked"):
        model, controller = trained(count=20, rank_change=mode, reprojection_freq=10_000)
        controller.cut(3)
        steps(controller, model, 10)
        if mode == "masked":
            assert {layer.rank for layer in controller.layers} == {6}
            assert all(not layer.A[3:].any() and not layer.B[:, 3:].any() for layer in controller.layers)
            controller.cut(2)
            steps(controller, model, 4)
            controller.finish()
        else:
            controller.cut(2)
            steps(controller, model, 4)
        assert {layer.rank for layer in controller.layers} == {2}
        results[mode] = logits(model)
    assert gap(results["masked"], results["physical"]) < 1e-3  # 14 steps of float32 training apart


def test_projection_in_place_is_the_papers():
    model, controller = trained(count=20, reprojection="two_sided", rank_change="none", preconditioner="grit")
    layer = controller.layers[0]
    controller.cut(2)
    assert layer.rank == 6
    assert int(torch.linalg.matrix_rank(layer.A.double(), rtol=1e-5)) == 2
    steps(controller, model, 1)
    assert int(torch.linalg.matrix_rank(layer.A.double(), rtol=1e-5)) > 2  # the next step fills it again


def test_ranks_follow_threshold_minimum_and_schedule():
    model, controller = trained(
        count=21, reprojection_freq=5, reprojection_warmup_steps=10, rank_adaptation_start_step=16, reprojection_k=5,
        min_lora_rank=2, rank_adaptation_threshold=0.5,
    )  # fmt: skip
    assert set(model.base_model.ranks().values()) <= {2, 3, 4, 5}
    assert min(model.base_model.ranks().values()) == 2
    model, controller = trained(
        count=12, reprojection_freq=5, reprojection_warmup_steps=10, rank_adaptation_start_step=16, reprojection_k=5
    )
    assert set(model.base_model.ranks().values()) == {5}
    model, _ = trained(count=9, reprojection_freq=5, reprojection_warmup_steps=10)
    assert set(model.base_model.ranks().values()) == {6}


@given(seed=st.integers(0, 50), threshold=st.floats(0.05, 1.0), least=st.integers(1, 6))
@settings(max_examples=10, deadline=None)
def test_ranks_stay_within_bounds(learnt, seed, threshold, least):
    _, controller = copy.deepcopy(learnt)
    controller.config.rank_adaptation_threshold, controller.config.min_lora_rank = threshold, least
    for allocation in ("global", "layer"):
        controller.config.rank_allocation = allocation
        controller.cut()
        assert all(least <= rank <= 6 for rank in controller.live_ranks.values())


def test_cut_of_a_merged_adapter_is_refused(learnt):
    model, controller = copy.deepcopy(learnt)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        controller.cut(2)


def test_layers_without_samples_are_left_alone():
    model, controller = trained(count=2, kfac_min_samples=10_000)
    assert controller.cut(2) == []
    assert set(model.base_model.ranks().values()) == {6}


def test_energy_of_a_layer_is_what_its_cut_costs(learnt):
    """The spectrum predicts, to second order, how much the loss changes when one layer is cut: by half its tail."""
    model, controller = copy.deepcopy(learnt)
    layer = controller.layers[-1]
    spectrum = energies("balanced", *controller.fishers[layer.name].factors)
    cuts = controller.cut(3)
    lost = next(cut.lost for cut in cuts if cut.name == layer.name)
    assert lost == pytest.approx(float(spectrum[3:].sum() / spectrum.sum()))


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_threshold_is_of_the_whole_however_many_cuts(allocation):
    """A second cut right after the first finds nothing left to spend."""
    model, controller = trained(count=40, rank_allocation=allocation, rank_adaptation_threshold=0.9)
    controller.cut()
    ranks = model.base_model.ranks()
    assert min(ranks.values()) < 6
    assert min(controller.kept_energy.values()) >= 0.9
    assert controller.cut() == []
    assert model.base_model.ranks() == ranks


@pytest.mark.parametrize("interval", [1, 50])
def test_first_cut_at_a_share_of_training(interval):
    model = adapted(reprojection_warmup_steps=0.75, reprojection_freq=interval, rank_adaptation_threshold=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"reprojection_warmup_steps=0.75 is a share of training. Pass total_steps="):
        GritController(model, optimizer)
    controller = GritController(model.train(), optimizer, total_steps=10)
    controller.attach()
    steps(controller, model, 7)
    assert set(model.base_model.ranks().values()) == {6}
    steps(controller, model, 1)
    assert min(model.base_model.ranks().values()) < 6
