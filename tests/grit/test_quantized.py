"""Adapters on 4-bit bases, with evaluations in between, which repack the weights on some CPUs."""

from __future__ import annotations

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_gradtools import GritConfig, GritTrainer
from tests.grit.reference import adapted, base_model, batch, brute_force, gap, rows, trainer


pytestmark = pytest.mark.bnb
bnb = pytest.importorskip("bitsandbytes")
TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantized(path, **options):
    """The base in NF4, and a dense model with exactly the weights that it stands for."""
    dense = base_model(hidden_size=64, intermediate_size=64)
    dense.save_pretrained(path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    base = LlamaForCausalLM.from_pretrained(
        path / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(name).weight.data = weight.to(torch.float32).clone()
    return base, dense


@pytest.mark.parametrize("double_quant", [False, True])
def test_statistics_with_an_evaluation_in_between(double_quant, tmp_path):
    options = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_use_double_quant": double_quant}
    base, dense = quantized(tmp_path, **options)
    steering = {"target_modules": TARGETS, "reprojection": None, "grit_cov_update_freq": 1, "ema_decay": 0.0}
    model, twin = adapted(base=base, **steering), adapted(base=dense, **steering)
    data = rows(4, padded=True)
    args = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    run = trainer(model, data, tmp_path, args=args, eval_dataset=rows(4, seed=9))
    run.evaluate()  # before training as well
    run.train()
    for layer in twin.base_model.layers():
        expected, tokens = brute_force(twin, layer, batch(data))
        fisher = run.controller.fishers[layer.name]
        assert fisher.samples == 3 * tokens
        for mine, theirs in zip(fisher.factors, expected, strict=True):
            assert gap(mine, theirs) < 1e-5


def test_training_evaluating_and_cutting_follow_the_dense_model(tmp_path):
    base, dense = quantized(tmp_path, bnb_4bit_compute_dtype=torch.float32)
    steering = {
        "target_modules": TARGETS, "reprojection_freq": 3, "grit_cov_update_freq": 1, "kfac_update_freq": 2,
        "rank_adaptation_threshold": 0.9,
    }  # fmt: skip
    results = []
    for model in (adapted(base=base, **steering), adapted(base=dense, **steering)):
        args = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2}
        run = trainer(model, rows(12, padded=True), tmp_path, args=args, eval_dataset=rows(4, seed=9))
        run.train()
        results.append((model.base_model.ranks(), run.evaluate()["eval_loss"]))
    assert results[0][0] == results[1][0]
    assert min(results[0][0].values()) < 6
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3)


def test_reload_and_bf16_adapters(tmp_path):
    """As TRL makes them on quantised bases: adapters in bf16, statistics in float32."""
    from peft import PeftModel

    base, _ = quantized(tmp_path, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True)
    model = adapted(
        base=base, target_modules=TARGETS, trained=False, reprojection_freq=4, rank_adaptation_threshold=0.9
    )
    for layer in model.base_model.layers():
        layer.A.data, layer.B.data = layer.A.data.bfloat16(), layer.B.data.bfloat16()
    run = trainer(model, rows(), tmp_path, args={"max_steps": 10, "bf16": True})
    run.train()
    assert all(f.average.dtype == torch.float32 and f.average[1].any() for f in run.controller.fishers.values())
    model.save_pretrained(tmp_path / "adapter")
    inputs = {k: v for k, v in batch(rows(2)).items() if k != "labels"}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        again = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter").eval()(**inputs).logits
    assert gap(again, expected) < 2e-2  # the reloaded adapter is float32


def test_int8_base(tmp_path):
    dense = base_model(hidden_size=64, intermediate_size=64)
    dense.save_pretrained(tmp_path / "dense")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    model = adapted(base=base, target_modules=TARGETS, trained=False, reprojection_freq=4)
    run = trainer(model, rows(), tmp_path, GritTrainer, args={"max_steps": 10})
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert isinstance(model.peft_config["default"], GritConfig)
