"""Beginning, ending, beginning again: what a controller leaves behind, and who else may be there."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import get_peft_model

from hf_gradtools import GritCallback, GritConfig, GritController, GritTrainer
from hf_gradtools.core.curvature import energies
from tests.grit.reference import adapted, base_model, batch, gap, rows, trainer


BUSY = {"grit_cov_update_freq": 1, "kfac_update_freq": 2, "kfac_min_samples": 1}


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(model, optimizer, count, data=None):
    for _ in range(count):
        model(**batch(data or rows(4))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_moments_are_in_plain_coordinates_after_training(cls):
    """With SGD rank-SOAP is the plain optimizer, so stopping and starting again must not matter either."""
    results = []
    for parts in ((8,), (4, 4), None):
        model = adapted(reprojection=None, **BUSY).double().train()
        options = {"lr": 0.1, "momentum": 0.9} if cls is torch.optim.SGD else {"lr": 1e-2}
        optimizer = cls(parameters(model), **options)
        for count in parts or (8,):
            if parts is None:
                steps(model, optimizer, count)
                continue
            with GritController(model, optimizer):
                steps(model, optimizer, count)
        results.append([p.detach() for p in parameters(model)])
    whole, halves, plain = results
    if cls is torch.optim.SGD:
        assert max(map(gap, halves, plain)) < 1e-10
        assert max(map(gap, whole, plain)) < 1e-10
    else:
        assert max(map(gap, whole, plain)) > 1e-3


def test_one_optimizer_has_one_controller():
    model = adapted(**BUSY)
    optimizer = torch.optim.AdamW(parameters(model))
    with GritController(model, optimizer):
        other = GritController(model, optimizer)
        with pytest.raises(ValueError, match="another GritController is attached"):
            other.attach()
    other.attach()
    other.detach()


def test_trainer_uses_the_callback_it_is_given(tmp_path):
    callback = GritCallback()
    run = trainer(adapted(**BUSY), rows(), tmp_path, callbacks=[callback])
    run.train()
    assert run.controller is callback.controller
    assert any("grit/rank" in row for row in run.state.log_history)


def test_config_makes_every_adapter_alike():
    """Training writes ranks into the model's own copy."""
    config = GritConfig(r=6, min_lora_rank=1, target_modules="all-linear", reprojection_warmup_steps=0, **BUSY)
    for _ in range(2):
        model = get_peft_model(base_model(), config).train()
        assert set(model.base_model.ranks().values()) == {6}
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
        with GritController(model, optimizer) as controller:
            steps(model, optimizer, 4)
            controller.cut(2)
        assert set(model.base_model.ranks().values()) == {2}
    assert config.rank_pattern == {}
    model.add_adapter("other", config)
    assert set(model.base_model.ranks("other").values()) == {6}


def test_factor_that_is_zero_has_no_energy():
    assert not energies("balanced", torch.eye(3), torch.zeros(3, 3)).any()
    assert not energies("balanced", torch.zeros(3, 3), torch.eye(3)).any()


def test_layer_without_gradients_leaves_the_others_their_ranks():
    """A dead branch is not cut, and takes no energy from those that live."""
    ranks = {}
    for is_dead in (False, True):
        model = adapted(reprojection_freq=10_000, rank_adaptation_threshold=0.9, **BUSY).train()
        if is_dead:
            model.base_model.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
        with GritController(model, optimizer) as controller:
            steps(model, optimizer, 4)
            controller.cut()
        ranks[is_dead] = model.base_model.ranks()
    dead = [name for name in ranks[True] if "layers.0.mlp" in name]
    assert {ranks[True][name] for name in dead} == {6}
    alive = [name for name in ranks[True] if name not in dead]
    assert sum(ranks[True][name] for name in alive) >= sum(ranks[False][name] for name in alive) - 6
    assert max(ranks[True][name] for name in alive) > 1


def test_layers_that_see_more_tokens_count_for_more():
    spectra = {}
    for repeats in (1, 10_000):
        model = adapted(reprojection_freq=10_000, rank_adaptation_threshold=0.9, **BUSY).train()
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
        with GritController(model, optimizer) as controller:
            steps(model, optimizer, 4)
            layer = controller.layers[0]
            controller.fishers[layer.name].samples *= repeats
            controller.cut()
        spectra[repeats] = controller.live_ranks[layer.name]
    assert spectra[10_000] > spectra[1]


@pytest.mark.parametrize("mode", ["masked", "none", "physical"])
def test_merged_adapter_is_not_cut(mode):
    model = adapted(rank_change=mode, **BUSY).train()
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    with GritController(model, optimizer, total_steps=4) as controller:
        steps(model, optimizer, 2)
        before = copy.deepcopy(model.base_model.model.state_dict())
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge_adapter"):
            controller.cut(2)
        model.unmerge_adapter()
        after = model.base_model.model.state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_training_again_after_masked_cuts(tmp_path):
    model = adapted(trained=False, rank_change="masked", reprojection_freq=2, rank_adaptation_threshold=0.8, **BUSY)
    run = trainer(model, rows(), tmp_path)
    run.train()
    ranks = model.base_model.ranks()
    assert min(ranks.values()) < 6
    run.train()
    assert all(model.base_model.ranks()[name] <= rank for name, rank in ranks.items())
    state = run.controller.optimizer.state
    assert all(state[p]["exp_avg"].shape == p.shape for p in parameters(model))


def test_training_again_after_the_best_checkpoint_was_another_rank(tmp_path):
    model = adapted(trained=False, reprojection_freq=6, rank_adaptation_threshold=0.6, **BUSY)
    args = {
        "max_steps": 10, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_marker", "greater_is_better": False,
    }  # fmt: skip
    run = trainer(
        model, rows(), tmp_path, args=args, eval_dataset=rows(4),
        compute_metrics=lambda p: {"marker": float(run.state.global_step)},
    )  # fmt: skip
    run.train()
    assert set(model.base_model.ranks().values()) == {6}
    run.train()


def test_inverses_of_cut_layers_are_there_at_once():
    model = adapted(preconditioner="kfac", reprojection_freq=10_000, **{**BUSY, "kfac_update_freq": 50}).train()
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    with GritController(model, optimizer) as controller:
        steps(model, optimizer, 4)
        controller.config.rank_adaptation_threshold = 0.999
        cuts = controller.cut()
        assert 0 < len(cuts) < len(controller.layers)
        assert controller.bases.keys() == controller.live_ranks.keys()
        for layer in controller.layers:
            assert controller.bases[layer.name].shape[-1] == layer.rank


def test_step_without_gradients():
    model = adapted(**BUSY).train()
    optimizer = torch.optim.AdamW(parameters(model))
    with GritController(model, optimizer) as controller:
        optimizer.step()
        steps(model, optimizer, 2)
        optimizer.step()
    assert controller.step == 4


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("mode", ["physical", "masked"])
def test_optimizers_go_on_through_cuts(cls, options, mode):
    model = adapted(rank_change=mode, reprojection_freq=4, rank_adaptation_threshold=0.8, **BUSY).train()
    optimizer = cls(parameters(model), lr=1e-4, weight_decay=0.01, **options)
    with GritController(model, optimizer, total_steps=20) as controller:
        steps(model, optimizer, 20)
        assert min(controller.live_ranks.values()) < 6
    assert all(p.isfinite().all() for p in parameters(model))


def test_state_of_another_preconditioner_is_refused(tmp_path):
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer(adapted(preconditioner="kfac", **BUSY), rows(), tmp_path, args=args).train()
    other = trainer(adapted(**BUSY), rows(), tmp_path, args={"max_steps": 6})
    with pytest.raises(ValueError, match="has preconditioner='kfac', not 'rank_soap'"):
        other.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


def test_checkpoint_one_level_down(tmp_path):
    """Where a hyperparameter search puts them."""

    class Search(GritTrainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / "run-0")

    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer(adapted(**BUSY), rows(), tmp_path, Search, args=args).train()
    assert (tmp_path / "run-0" / "checkpoint-2" / "grit_state.safetensors").exists()


def test_clip_after_leaves_an_overflow_alone():
    model = adapted(preconditioner="kfac", **BUSY).train()
    optimizer = torch.optim.AdamW(parameters(model))
    with GritController(model, optimizer) as controller:
        model(**batch(rows(4))).loss.backward()
        next(iter(parameters(model))).grad.fill_(float("inf"))
        assert controller.grad_norm() == float("inf")
        controller.begin_step()
        assert all(not fisher.tokens for fisher in controller.fishers.values())
        optimizer.zero_grad()
        steps(model, optimizer, 1)
    assert all(fisher.samples == 40 for fisher in controller.fishers.values())


def test_losses_that_are_not_finite_are_no_trend(tmp_path):
    model = adapted(adaptive_schedule=True, **BUSY).train()
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    with GritController(model, optimizer) as controller:
        controller.losses.observe(float("nan"))
        steps(model, optimizer, 12)
        assert len(controller.losses.losses) == 12
        assert controller.figures["damping"] > 1e-3


def test_padding_that_is_not_a_number_is_not_counted():
    from hf_gradtools.grit.fisher import RankFisher

    fisher = RankFisher(torch.empty(3, 5))
    values = torch.ones(4, 3)
    values[1] = float("nan")
    fisher.add(values, values, torch.tensor([True, False, True, True]), 1.0)
    assert fisher.sums.isfinite().all()
    assert float(fisher.tokens) == 3


def test_reports_survive_json(tmp_path):
    run = trainer(adapted(trained=False, **BUSY), rows(), tmp_path)
    run.train()
    report = json.loads((tmp_path / "grit_ranks.json").read_text())
    assert report["threshold"] == 0.97
    assert len(report["layers"]) == 14


@pytest.mark.parametrize("is_early", [False, True])
def test_loss_scaler_changes_nothing(is_early):
    """Statistics, regularisers and steps under torch's scaler, with gradients turned before or after unscaling."""
    results = []
    for scaled in (False, True):
        model = adapted(reprojection=None, lambda_kfac=1e-2, preconditioner="kfac", **BUSY).double().train()
        optimizer = torch.optim.SGD(parameters(model), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with GritController(model, optimizer, grad_scale=scaler.get_scale) as controller:
            for _ in range(4):
                scaler.scale(model(**batch(rows(4))).loss).backward()
                if is_early:
                    controller.precondition(scaler.get_scale())
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        results.append([p.detach() for p in parameters(model)])
    assert max(map(gap, *results)) < 1e-10
