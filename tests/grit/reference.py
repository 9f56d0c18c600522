"""Small models with GRIT adapters, and their rank-space statistics by brute force."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gradtools import GritConfig, GritTrainer


TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def base_model(kind="llama", seed=0, **options):
    torch.manual_seed(seed)
    if kind == "llama":
        shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, **{**shape, **options}))
    if kind == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=32, **dropout))
    shape = {"d_model": 24, "d_ff": 40, "d_kv": 12, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, pad_token_id=0, decoder_start_token_id=0, **shape))


def adapted(kind="llama", seed=0, base=None, trained=True, **options):
    """A model with an adapter; `trained`: B is not zero, as it is at the start."""
    defaults = {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "task_type": TASKS[kind],
        "min_lora_rank": 1,
        "reprojection_warmup_steps": 0,
    }
    base = base_model(kind, seed) if base is None else base
    torch.manual_seed(seed + 2)
    model = get_peft_model(base, GritConfig(**{**defaults, **options}))
    if trained:
        generator = torch.Generator().manual_seed(seed + 1)
        for layer in model.base_model.layers():
            layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator).to(layer.B)
    return model


def rows(count=12, length=10, seed=0, padded=False, kind="llama"):
    """Tokenized rows; if `padded`, of several lengths, filled up on alternating sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if padded:
        for i in range(count):
            gone = slice(length - i % 5, None) if i % 2 or kind == "t5" else slice(0, i % 5)
            mask[i, gone], labels[i, gone] = 0, -100
        ids = ids * mask
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


def batch(dataset, start=0, stop=None):
    return {k: torch.tensor(v) for k, v in dataset[start : stop or len(dataset)].items()}


def trainer(model, dataset, path, cls=GritTrainer, args=None, **options):
    from transformers import Seq2SeqTrainingArguments

    defaults = {
        "output_dir": str(path), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "seed": 3,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    training = Seq2SeqTrainingArguments(**{**defaults, **(args or {})})
    return cls(model=model, args=training, train_dataset=dataset, **options)


def brute_force(model, layer, inputs, loss_divisor=None, reads="attention_mask", dtype=torch.float64):
    """Σ_a and Σ_g of one layer from its raw inputs and output gradients: `X Aᵀ` and `s G B`, real tokens only."""
    import copy

    model = copy.deepcopy(model).to(dtype).train()
    twin = next(x for x in model.base_model.layers() if x.name == layer.name)
    seen = {}

    def keep_input(module, args, output):
        seen["x"] = args[0].detach()
        output.register_hook(lambda grad: seen.__setitem__("g", grad))

    handle = twin.module.register_forward_hook(keep_input)
    loss = model(**inputs).loss
    loss.backward()
    handle.remove()
    mask = inputs.get(reads)
    mask = torch.ones(seen["x"].shape[:-1]) if mask is None else mask
    real = mask.flatten().bool()
    a = (seen["x"] @ twin.A.mT).flatten(0, -2)[real]
    b = (twin.module.scaling[twin.adapter] * seen["g"] @ twin.B).flatten(0, -2)[real]
    if loss_divisor is None:
        labels = inputs["labels"] if model.config.is_encoder_decoder else inputs["labels"][:, 1:]
        loss_divisor = (labels != -100).sum()
    b = b * loss_divisor
    return torch.stack([a.mT @ a, b.mT @ b]) / len(a), len(a)


def gap(mine, reference):
    return float((mine.double() - reference.double()).abs().max() / reference.double().abs().max())
