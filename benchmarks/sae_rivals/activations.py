"""Activations in the file format of the workers: structured random ones, or a tensor of any safetensors file.

```
python -m sae_rivals.activations STORED.safetensors layers.15 OUT.safetensors [--heldout 20000]
```

Random ones have a mean, and per token some of many directions that occur by a power law, with log-normal strengths,
and noise: what an SAE can partly explain, so that latents fire as unevenly as on a language model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F


DIRECTIONS, ACTIVE, NOISE = 6144, 24, 0.3


def structured(tokens: int, d_in: int, seed: int = 0) -> Tensor:
    """`[tokens, d_in]` in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(DIRECTIONS, d_in, generator=generator), dim=1)
    mean = torch.randn(d_in, generator=generator)
    frequencies = 1 / torch.arange(1, DIRECTIONS + 1) ** 0.8
    parts = []
    for count in [8192] * (tokens // 8192) + [tokens % 8192] * (tokens % 8192 > 0):
        chosen = torch.multinomial(frequencies.expand(count, -1), ACTIVE, generator=generator)
        strengths = 2 * (0.5 * torch.randn(count, ACTIVE, generator=generator)).exp()
        x = F.embedding_bag(chosen, directions, per_sample_weights=strengths, mode="sum")
        noise = NOISE / d_in**0.5 * ACTIVE**0.5 * torch.randn(count, d_in, generator=generator)
        parts.append((x + mean + noise).bfloat16())
    return torch.cat(parts)


def write_structured(file: Path, tokens: int, heldout: int, d_in: int) -> None:
    rows = structured(tokens + heldout, d_in)
    save_file({"train": rows[:tokens].contiguous(), "heldout": rows[tokens:].contiguous()}, file)


def write_split(source: Path, name: str, file: Path, heldout: int, seed: int = 0) -> None:
    """The rows of one tensor, shuffled; the first `heldout` of them are held out."""
    with safe_open(source, framework="pt") as stored:
        rows = stored.get_tensor(name)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    save_file({"train": rows[order[heldout:]], "heldout": rows[order[:heldout]]}, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--heldout", type=int, default=20_000)
    args = parser.parse_args()
    write_split(args.source, args.name, args.file, args.heldout)
