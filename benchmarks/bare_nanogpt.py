"""A nanoGPT as one would write it by hand, and its training loop: what our model in the Trainer is measured against.

Written afresh for the benchmarks and tests, after the architecture and the names in the checkpoints of nanoGPT
(`transformer.h.0.attn.c_attn.weight`, …, `lm_head.weight`). Nothing but torch and numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class BareConfig:
    """nanoGPT's `model_args`. `rotary` turns queries and keys by their position and leaves `wpe` out."""

    block_size: int = 64
    vocab_size: int = 65
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    bias: bool = False
    rotary: bool = False


class LayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, config: BareConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.rotary = config.rotary
        if config.rotary:
            half = config.n_embd // config.n_head // 2
            angles = torch.outer(torch.arange(config.block_size).float(), 10000.0 ** (-torch.arange(half) / half))
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        if self.rotary:
            q, k = self.turned(q), self.turned(k)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, length, width)))


class MLP(nn.Module):
    def __init__(self, config: BareConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: BareConfig):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BareNanoGPT(nn.Module):
    """Learned positions, pre-LayerNorm blocks, GELU, a head tied to the embedding."""

    def __init__(self, config: BareConfig):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if not config.rotary:
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts["ln_f"] = LayerNorm(config.n_embd, config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer.wte(ids)
        if not self.config.rotary:
            x = x + self.transformer.wpe(torch.arange(ids.shape[1], device=ids.device))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int) -> Tensor:
        """Greedy, without a cache: nanoGPT computes the whole window for every token."""
        for _ in range(max_new_tokens):
            logits, _ = self(ids[:, -self.config.block_size :])
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids

    def checkpoint(self, prefix: str = "") -> dict[str, object]:
        """What nanoGPT's training script keeps in `ckpt.pt`, as far as the model goes."""
        args = {
            name: getattr(self.config, name)
            for name in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
        }
        state = {prefix + name: value for name, value in self.state_dict().items()}
        return {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": 1.5, "config": dict(args)}


# ---- the loop


def get_batch(tokens: np.ndarray, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Rows at random offsets, and the same one token on."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    x = torch.stack([torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    return x, y


def configure_adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Decay for what has two dimensions or more. Fused, as the Trainer's default is."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def cosine_lr(step: int, peak: float, floor: float, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step > total_steps:
        return floor
    part = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + 0.5 * (1 + math.cos(math.pi * part)) * (peak - floor)


@dataclass
class LoopOptions:
    """nanoGPT's numbers for its small model on a CPU."""

    batch_size: int = 12
    learning_rate: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    log_every_steps: int = 10


def training_steps(
    model: nn.Module,
    tokens: np.ndarray,
    options: LoopOptions,
    total_steps: int,
    loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: model(x, y)[1],
    block_size: int | None = None,
) -> Iterator[float | None]:
    """The loop of nanoGPT's training script on one device, one optimiser step per item.

    Yields:
        The loss at every `log_every_steps`-th step, None at the others.
    """
    block_size = block_size or model.config.block_size
    optimizer = configure_adamw(model, options.learning_rate, options.weight_decay)
    model.train()
    x, y = get_batch(tokens, options.batch_size, block_size)
    for step in range(total_steps):
        lr = cosine_lr(step, options.learning_rate, options.min_lr, options.warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, x, y)
        x, y = get_batch(tokens, options.batch_size, block_size)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item() if step % options.log_every_steps == 0 else None
