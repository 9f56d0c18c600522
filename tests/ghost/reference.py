"""Small models and the naive loop that the ghost engine is held against: one backward pass per sample."""

from __future__ import annotations

import copy

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_gradtools import GhostDotProdCallback


VOCAB = 67


def gpt2(dropout=0.0, **kwargs):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **kwargs,
    )  # fmt: skip
    return perturbed(GPT2LMHeadModel(config))


def llama(tie=True, **kwargs):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, tie_word_embeddings=tie, max_position_embeddings=64, **kwargs,
    )  # fmt: skip
    return perturbed(LlamaForCausalLM(config))


def perturbed(model):
    """Moves norms and biases off their initial ones and zeros, where wrong formulas can hide."""
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


def rows(n, seed=0, length=(6, 14), pad_left=False):
    """Right- (or left-) padded rows of random tokens with prompts masked by -100."""
    g = torch.Generator().manual_seed(seed)
    width = length[1]
    found = []
    for _ in range(n):
        size = int(torch.randint(length[0], width + 1, (1,), generator=g))
        ids = torch.randint(1, VOCAB, (size,), generator=g).tolist()
        labels = [-100, -100, *ids[2:]]
        pad = width - size
        parts = [(ids, [0] * pad), (labels, [-100] * pad), ([1] * size, [0] * pad)]
        ids, labels, mask = (b + a if pad_left else a + b for a, b in parts)
        found.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return Dataset.from_list(found)


def as_batch(dataset):
    return {k: torch.tensor(dataset[k]) for k in ("input_ids", "labels", "attention_mask")}


class Recorder(TrainerCallback):
    """Keeps the weights of every step and, for every micro-batch, what the model was called with."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def pre_hook(module, args_, kwargs_):
            if module.training and torch.is_grad_enabled():
                tensors = {k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs_.items() if "ghost" not in k}
                self.steps[-1]["batches"].append((tensors, torch.random.get_rng_state()))

        self.handle = model.register_forward_pre_hook(pre_hook, with_kwargs=True)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append({"weights": copy.deepcopy(model.state_dict()), "batches": []})

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


def sample_losses(model, batch, count):
    """Each row's share of the batch loss, from logits, as the sum of its token losses over `count`."""
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(logits.transpose(1, 2).to(model.dtype), labels, reduction="none")
    return losses.sum(1) / count


def per_sample_gradients(model, losses):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        yield [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def validation_gradient(model, batch):
    model.eval()
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = sample_losses(model, batch, count).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def reference_step(model, step, val_batch, dtype=torch.float64, dropout=False):
    """Dot products and norms of one recorded step, one backward pass per sample: `[M]`, `[M]`."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # patched by accelerate (autocast) or TRL (fused head)
    model.load_state_dict(step["weights"])
    model = model.to(dtype)
    target = validation_gradient(model, val_batch)
    model.train(dropout)
    dots, norms = [], []
    for batch, rng in step["batches"]:
        count = batch.get("num_items_in_batch")
        if count is None:
            count = (batch["labels"][:, 1:] != -100).sum() * len(step["batches"])
        torch.random.set_rng_state(rng)
        for grads in per_sample_gradients(model, sample_losses(model, batch, count)):
            dots.append(sum((g * t).sum() for g, t in zip(grads, target, strict=True)))
            norms.append(sum(g.square().sum() for g in grads).sqrt())
    return torch.stack(dots).double(), torch.stack(norms).double()


def train(model, train_rows, val_rows, path, *, callbacks=(), args=None, trainer=Trainer, **options):
    """A short Trainer run with the callback; returns it, the recorder and the trainer."""
    callback = GhostDotProdCallback(val_rows, output_dir=str(path / "ghost"), **{"val_batch_size": None, **options})
    recorder = Recorder()
    defaults = {
        "output_dir": str(path / "out"), "per_device_train_batch_size": 3, "max_steps": 3, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 1,
    }  # fmt: skip
    training = TrainingArguments(**{**defaults, **(args or {})})
    run = trainer(model=model, args=training, train_dataset=train_rows, callbacks=[callback, recorder, *callbacks])
    run.train()
    return callback, recorder, run


def errors(callback, recorder, model, val_rows, column="dot_product", **reference):
    """Largest difference to the reference over the largest value, over all steps."""
    rows_ = callback.dataset.with_format("numpy")[:]
    gap, size = 0.0, 0.0
    for number, step in enumerate(recorder.steps, start=1):
        mine = torch.tensor(rows_[column][rows_["step"] == number]).double()
        dots, norms = reference_step(model, step, as_batch(val_rows), **reference)
        expected = norms if column == "grad_norm" else dots
        gap = max(gap, float((mine - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    return gap / size
