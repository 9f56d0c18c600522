"""Mistakes are named early, with the remedy."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_gradtools import GritCallback, GritConfig, GritController, GritTrainer, export_lora
from tests.grit.reference import adapted, base_model, rows, trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 must be at least 1"),
        ({"lora_rank": 0}, "r=0 must be at least 1"),
        ({"rank_adaptation_threshold": 0.0}, r"rank_adaptation_threshold=0.0 must be in \(0, 1\]"),
        ({"rank_adaptation_threshold": 1.01}, r"must be in \(0, 1\]"),
        ({"min_lora_rank": 9}, "min_lora_rank=9 is above r=8"),
        ({"min_lora_rank": 0}, "min_lora_rank=0"),
        ({"preconditioner": "adam"}, "preconditioner='adam' is unknown. Pass one of 'rank_soap'"),
        ({"reprojection": "svd"}, "reprojection='svd' is unknown"),
        ({"rank_change": "maybe"}, "rank_change='maybe'"),
        ({"rank_allocation": "all"}, "rank_allocation='all'"),
        ({"statistics": "median"}, "statistics='median'"),
        ({"kfac_damping": 0.0}, "kfac_damping=0.0 must be positive"),
        ({"kfac_update_freq": 0}, "kfac_update_freq=0 must be a whole number of at least 1"),
        ({"grit_cov_update_freq": 0}, "grit_cov_update_freq=0"),
        ({"kfac_update_freq": 2.5}, "kfac_update_freq=2.5 must be a whole number"),
        ({"lambda_kfac": float("nan")}, "lambda_kfac=nan"),
        ({"reprojection_k": 0}, "reprojection_k=0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"lambda_kfac": -1.0}, "lambda_kfac=-1.0"),
        ({"lambda_reproj": 1e-4, "reprojection": None}, "lambda_reproj=0.0001 needs a reprojection"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base weights"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        GritConfig(**options)


def test_presets_and_seed_names():
    assert GritConfig.preset("long").reprojection_freq == 300
    assert GritConfig.preset("short", r=4).r == 4
    assert GritConfig.preset("seed").reprojection == "two_sided"
    assert GritConfig(r=2).least_rank == 2
    assert GritConfig(lora_rank=5).r == 5
    assert GritConfig(use_two_sided_reprojection=True).reprojection == "two_sided"
    assert GritConfig(use_two_sided_reprojection=False).reprojection == "one_sided"
    with pytest.raises(ValueError, match="preset='medium' is unknown. Pass one of short, long, seed"):
        GritConfig.preset("medium")


def test_nothing_to_steer():
    with pytest.raises(ValueError, match="holds no linear layer that GRIT can steer"):
        get_peft_model(base_model(), GritConfig(target_modules=["embed_tokens"]))


def test_layer_that_lora_does_not_know():
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(base_model(), GritConfig(target_modules=["input_layernorm"]))


def optimizer_of(model, cls=torch.optim.AdamW, **options):
    return cls([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-3, **options})


def test_other_adapters_and_plain_models():
    lora = get_peft_model(base_model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="has an adapter of type LORA; GRIT steers"):
        GritController(lora, optimizer_of(lora))
    plain = base_model()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter"):
        GritController(plain, optimizer_of(plain))


def test_callback_without_an_adapter_of_ours(tmp_path):
    run = trainer(base_model(), rows(), tmp_path, callbacks=[GritCallback()], cls=__import__("transformers").Trainer)
    with pytest.raises(ValueError, match="has no adapter"):
        run.train()


def test_frozen_adapter():
    model = adapted()
    optimizer = optimizer_of(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        GritController(model, optimizer)


def test_optimizer_of_another_model():
    with pytest.raises(ValueError, match="the optimizer does not hold the adapter"):
        GritController(adapted(), optimizer_of(adapted()))


def test_optimizer_whose_state_cannot_follow():
    model = adapted()
    with pytest.raises(ValueError, match="optim='adamw_torch'"):
        GritController(model, optimizer_of(model, torch.optim.Adadelta))
    passive = adapted(preconditioner="kfac", reprojection=None)
    GritController(passive, optimizer_of(passive, torch.optim.Adadelta))
    with pytest.raises(ValueError, match="torch step hooks"):
        GritController(model, object())


def test_closures_are_refused():
    model = adapted()
    optimizer = optimizer_of(model)
    with GritController(model, optimizer), pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)


def test_several_active_adapters():
    model = adapted()
    model.add_adapter("other", GritConfig(target_modules="all-linear"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one at a time"):
        GritController(model, optimizer_of(model))


def test_clip():
    with pytest.raises(ValueError, match="clip='never' is unknown. Pass one of 'before', 'after'"):
        GritTrainer(adapted(), clip="never")


def test_export(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        export_lora(adapted(), tmp_path / "full")
    assert (tmp_path / "full" / "x").read_text() == "mine"
    with pytest.raises(ValueError, match="adapter_name='other' is none of default"):
        export_lora(adapted(), tmp_path / "out", "other")
    get_peft_model(base_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="not GRIT"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "lora"]
