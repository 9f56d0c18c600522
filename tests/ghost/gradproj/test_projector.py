"""`GradProjector` against `torch.func` gradients of one unpadded sample at a time, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gradtools.ghost.coverage import UncoveredGradientError
from hf_gradtools.ghost.gradproj.projector import GradProjector
from tests.ghost.gradproj.reference_projection import error, expected_rows, unpadded
from tests.ghost.reference import VOCAB, gpt2, llama, perturbed, rows
from tests.ghost.test_models import SMALL, adapted, dequantized


ROWS = rows(7)
EVERYTHING = {"layers": None, "rank": (5, 6), "proj_rank_total": 200}


def projected(model, data=ROWS, batch_size=3, **options):
    projector = GradProjector(model, **{**EVERYTHING, **options})
    return projector, projector.gradients(data, batch_size=batch_size)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["conv1d_layernorm_tied", "linear_rmsnorm_tied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": "auto"},
        {"rank": "auto", "layers": "all-linear", "proj_rank_total": None},
        {"stages": 1, "proj_rank_total": None},
        {"stages": 1, "rank": None, "proj_rank_total": 400, "basis": "rademacher"},
        {"stages": 1, "rank": (None, 3), "proj_rank_total": None, "basis": "gaussian"},
        {"stages": 1, "rank": (None, None), "proj_rank_total": None},
        {"basis": "pca"},
        {"layers": [r"\.1\..*(mlp|attn)"]},
    ],
    ids=["two_stages", "auto", "default", "one_stage", "split", "one_sided", "exact", "pca", "some_layers"],
)
def test_ways_to_project(make, options):
    projector, mine = projected(make(), **options)
    assert mine.shape == (7, projector.dim)
    assert error(mine, expected_rows(projector, ROWS)) < 1e-5


def test_exact_rows_have_the_exact_inner_products():
    model = gpt2()
    projector, mine = projected(model, layers=None, rank=(None, None), stages=1, proj_rank_total=None)
    assert projector.dim == sum(p.numel() for p in model.parameters())
    grads = expected_rows(projector, ROWS)
    assert error(mine @ mine.T, grads @ grads.T) < 1e-5


@pytest.mark.parametrize("pad_left", [False, True])
def test_rows_do_not_depend_on_batch_size_order_or_padding(pad_left):
    model = llama()  # positions follow the mask nowhere else than in rotary differences
    padded = rows(7, pad_left=pad_left)
    projector, one_by_one = projected(model, padded, batch_size=1)
    for batch_size in (2, 7):
        assert error(projector.gradients(padded, batch_size=batch_size), one_by_one) < 1e-5
    order = [3, 0, 6, 5, 1, 2, 4]
    assert error(projector.gradients(padded.select(order), batch_size=3), one_by_one[order]) < 1e-5
    assert error(one_by_one, expected_rows(projector, padded)) < 1e-5
    bare = [{k: v[0].tolist() for k, v in unpadded(row).items()} for row in padded]
    assert error(projector.gradients(bare, batch_size=4), one_by_one) < 1e-5


def test_sum_is_the_mean_times_the_number_of_targets():
    _, mean = projected(llama())
    _, total = projected(llama(), loss_reduction="sum")
    targets = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in ROWS])
    assert error(total, mean.double() * targets[:, None]) < 1e-5


def test_bfloat16():
    model = llama().to(torch.bfloat16)
    projector, mine = projected(model, layers="all-linear")
    assert mine.dtype == torch.float32
    assert error(mine, expected_rows(projector, ROWS)) < 3e-2


@pytest.mark.parametrize("base", [gpt2, llama])
def test_lora(base):
    model = adapted(base(), target_modules=["c_attn", "c_fc"] if base is gpt2 else ["q_proj", "v_proj", "up_proj"])
    projector, mine = projected(model)
    assert all("lora_" in layer.name for layer in projector.layers)
    assert error(mine, expected_rows(projector, ROWS)) < 1e-5


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
    ],
    ids=["dora", "modules_to_save", "embedding", "bias"],
)
def test_adapter_kinds(kwargs):
    projector, mine = projected(adapted(llama(tie=False, attention_bias=True), **kwargs))
    assert error(mine, expected_rows(projector, ROWS)) < 1e-5


def test_an_adapter_loaded_for_inference(tmp_path):
    model = adapted(llama(), target_modules=["q_proj"])
    _, expected = projected(model)
    model.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not any(p.requires_grad for p in loaded.parameters())
    projector, mine = projected(loaded)
    assert error(mine, expected) < 1e-5
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.bnb
def test_lora_on_nf4_after_a_forward_for_inference():
    pytest.importorskip("bitsandbytes")
    config = type(llama().config)(**{**SMALL, "hidden_size": 64, "intermediate_size": 64})
    dense = LlamaForCausalLM(config)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        base = LlamaForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
        )
    targets = ["q_proj", "v_proj", "down_proj"]
    twin = GradProjector(adapted(dequantized(base, dense), target_modules=targets), **EVERYTHING)
    projector, mine = projected(adapted(base, target_modules=targets))
    assert error(mine, expected_rows(twin, ROWS)) < 1e-5
    assert error(projector.gradients(ROWS), expected_rows(twin, ROWS)) < 1e-5


def test_gemmas_scaled_embedding_and_shifted_norm():
    model = perturbed(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=12, pad_token_id=0)))
    projector, mine = projected(model)
    assert error(mine, expected_rows(projector, ROWS, dtype=torch.float32)) < 1e-5


def test_experts():
    torch.manual_seed(0)
    model = perturbed(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1)))
    projector, mine = projected(model, batch_size=3)
    assert error(mine, expected_rows(projector, ROWS, dtype=torch.float32)) < 5e-5


def test_a_module_that_is_called_several_times():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCAB, embedding_size=12, hidden_size=24, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = perturbed(AlbertForSequenceClassification(config))
    data = Dataset.from_list([{**row, "labels": [i % 3]} for i, row in enumerate(ROWS.remove_columns("labels"))])
    projector, mine = projected(model, data, data_collator=None, layers=None)
    assert error(mine, expected_rows(projector, data, as_batch=class_batch)) < 1e-5


def class_batch(row):
    batch = unpadded(row)
    return {**batch, "labels": batch["labels"][:, 0] if batch["labels"].ndim > 1 else batch["labels"]}


def test_sequence_to_sequence_with_lora():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, target_modules=["q", "v", "wi", "wo"]))
    pairs = [(row["input_ids"][:n], row["input_ids"][-n + 2 :]) for n, row in enumerate(ROWS, start=5)]
    data = [{"input_ids": source, "labels": target} for source, target in pairs]
    projector, mine = projected(model, data)
    assert error(mine, expected_rows(projector, data, as_batch=alone)) < 1e-5


def alone(row):
    return {name: torch.tensor([values]) for name, values in row.items()}


def test_any_module_with_a_loss_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [{"x": torch.randn(2, 6), "y": torch.tensor(i % 3)} for i in range(7)]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def collate(picked):
        return {k: torch.stack([row[k] for row in picked]) for k in ("x", "y")}

    projector, mine = projected(model, data, loss_fn=loss_fn, data_collator=collate)
    reference = expected_rows(
        projector, data, loss_fn=loss_fn, as_batch=lambda r: {"x": r["x"][None], "y": r["y"][None]}
    )
    assert error(mine, reference) < 1e-5


def test_adams_step_of_a_gradient(tmp_path):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(**unpadded(ROWS[0]))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    projector = GradProjector(model, optimizer_state=optimizer, **EVERYTHING)
    mine = projector.gradients(ROWS, optimizer_aware=True, batch_size=3)
    factors = {}
    for p in model.parameters():
        state = optimizer.state[p]
        unbiased = state["exp_avg_sq"] / (1 - 0.999**3)
        factors[p] = 0.1 / (1 - 0.9**4) / (unbiased.sqrt() + 1e-8)
    assert error(mine, expected_rows(projector, ROWS, factors=factors)) < 1e-5


def test_layer_dots_add_up_to_the_inner_products_of_the_first_stage():
    projector = GradProjector(llama(), layers=None, rank=(None, None), proj_rank_total=100)
    exact, mine = projected(llama(), layers=None, rank=(None, None), stages=1, proj_rank_total=None)
    dots = projector.layer_dots(ROWS.select([0, 1]), ROWS)
    assert set(dots) <= {layer.name for layer in projector.layers}
    assert error(sum(dots.values()), (mine[:2] @ mine.T).double()) < 1e-5


# ---- the model is left as it was


def test_the_model_is_left_as_it_was():
    model = gpt2(dropout=0.1).train()
    model.transformer.wpe.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    state = torch.random.get_rng_state()
    projector, _ = projected(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.config.use_cache == before.config.use_cache
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
        assert p.grad is None, name
    for module, twin in zip(model.modules(), before.modules(), strict=True):
        assert module.training == twin.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert "transformer.wpe" not in [layer.name for layer in projector.layers]


def test_a_weight_used_outside_its_module_is_noticed():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, labels):
            return {"loss": (self.b(self.a(x)) @ self.a.weight).square().mean()}

    data = [{"x": torch.randn(4), "labels": torch.tensor(0)} for _ in range(3)]

    def collate(picked):
        return {k: torch.stack([row[k] for row in picked]) for k in ("x", "labels")}

    with pytest.raises(UncoveredGradientError, match=r"the gradient of a\.weight is not all in the projections"):
        projected(Sneaky(), data, data_collator=collate)
    projected(Sneaky(), data, data_collator=collate, layers=["b"])
