"""A tiny dataset and model, and nanoGPT's loop written plainly: what a run of `train` is compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import set_seed

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.data import TokenFolder, prepare
from hf_gradtools.nanogpt.training import TrainOptions


TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 30
MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
RUN = {
    "batch_size": 4, "max_iters": 12, "eval_interval": 4, "eval_iters": 2, "log_interval": 1, "warmup_iters": 3,
    "learning_rate": 1e-2, "progress": False, "device": "cpu",
}  # fmt: skip


def make_dataset(folder: Path) -> str:
    (folder / "input.txt").write_text(TEXT)
    prepare(str(folder / "input.txt"), folder / "data")
    return str(folder / "data")


def options(dataset: str, out_dir: Path, **changes) -> TrainOptions:
    return TrainOptions(**{**RUN, "dataset": dataset, "out_dir": str(out_dir), **changes})


def history(out_dir: Path, *names: str) -> list[tuple]:
    rows = json.loads((Path(out_dir) / "trainer_state.json").read_text())["log_history"]
    return [tuple(row[name] for name in ("step", *names)) for row in rows if all(name in row for name in names)]


def cosine(iteration: int, warmup: int, until: int, peak: float, least: float) -> float:
    """`get_lr` of nanoGPT."""
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    if iteration > until:
        return least
    return least + (peak - least) * (1 + math.cos(math.pi * (iteration - warmup) / (until - warmup))) / 2


def plain_losses(run: TrainOptions, config: dict, iterations: int) -> list[float]:
    """The losses of nanoGPT's loop on the blocks that a run would see."""
    data = TokenFolder(run.dataset)
    set_seed(run.seed)
    model = NanoGPTForCausalLM(NanoGPTConfig(vocab_size=data.vocab_size, **config)).train()
    set_seed(run.seed)  # Trainer does so before it starts
    blocks = data.blocks("train", config["block_size"], run.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(run.beta1, run.beta2))
    losses, sample, accumulated = [], 0, run.gradient_accumulation_steps
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            least = run.learning_rate / 10
            group["lr"] = cosine(iteration, run.warmup_iters, run.max_iters, run.learning_rate, least)
        total = 0.0
        for _ in range(accumulated):
            batch = blocks.batch(range(sample, sample + run.batch_size))
            sample += run.batch_size
            logits = model(batch["input_ids"]).logits
            targets = batch["shift_labels"].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets) / accumulated
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
