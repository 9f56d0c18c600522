"""Time and peak memory of a GradMem training step, by mode and by number of inner steps.

```
python benchmarks/gradmem_step.py [--shapes small vocabulary] [--steps 1 2 4 8] [--rounds 6] [--output table.md]
python benchmarks/gradmem_step.py --shapes small --d 256 --layers 4 --context 256 --batch 8
```

A step writes a batch of contexts, reads one query each, and is back-propagated through both; the optimizer, the same
for all, is left out. It is compared with the plain way, written here: transformers' eager attention, an inner loop
with `create_graph=True`, and logits as they come. Both start from the same weights, and their losses and gradients are
compared before anything is measured.

All variants of one number of steps run in one process in interleaved rounds; the time is the process' CPU time, and
its ratio is the median over the rounds of the ratio to the plain way in the same round. The peak is the largest sum of
live bytes that torch's CPU allocator sees during a step, beyond weights and gradients that are there before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from common import MIB, Times, Variant, check_peak_bytes, environment, markdown_table, peak_bytes, time_interleaved
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from hf_gradtools.gradmem import GradMemConfig, GradMemGPTForCausalLM


PLAIN = "plain second order"
RATE = 0.1  # of the inner steps


@dataclass(frozen=True)
class Shape:
    """A Llama of `layers` layers of width `d`, M vectors of memory, and a batch of contexts and queries."""

    d: int = 128
    layers: int = 4
    heads: int = 4
    vocab: int = 66
    memory: int = 8
    context: int = 128
    query: int = 8
    batch: int = 16

    def __str__(self) -> str:
        return (
            f"Llama d={self.d} L={self.layers} V={self.vocab}, M={self.memory}, {self.context} tokens of context, "
            f"{self.query} of query, B={self.batch}"
        )

    def model(self) -> GradMemGPTForCausalLM:
        torch.manual_seed(0)
        backbone = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.d, intermediate_size=self.d * 8 // 3, tie_word_embeddings=True,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=self.memory + self.context, initializer_range=self.d**-0.5,
        )  # fmt: skip
        return GradMemGPTForCausalLM(GradMemConfig(base_config=backbone, n_mem_tokens=self.memory, inner_lr=RATE))

    def rows(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        contexts, queries = (
            torch.randint(3, self.vocab, (self.batch, length), generator=generator)
            for length in (self.context, self.query)
        )
        return {"context_ids": contexts, "input_ids": queries, "labels": queries}


SHAPES = {
    "small": Shape(),
    "long": Shape(layers=2, context=512, batch=2),
    "vocabulary": Shape(layers=2, vocab=49152, context=64, batch=4),
}
SIZES = [field.name for field in fields(Shape)]
MODES: dict[str, dict[str, Any]] = {
    "**second, recomputed** (default)": {},
    "second, all steps kept": {"recompute_write": False},
    "first": {"grad_mode": "first"},
    "none": {"grad_mode": "none"},
}


def plain_loss(model: GradMemGPTForCausalLM, rows: dict[str, Tensor], steps: int, is_second: bool = True) -> Tensor:
    """The loss of one step as one would write it first: everything in the graph."""
    backbone, embed = model.backbone, model.get_input_embeddings()
    contexts, queries = rows["context_ids"], rows["input_ids"]
    memory = model.mem.expand(len(contexts), -1, -1)
    last = memory.shape[1] - 1  # it predicts the first token
    for _ in range(steps):
        inputs = torch.cat([memory, embed(contexts)], 1)
        logits = backbone(inputs_embeds=inputs, use_cache=False).logits[:, last:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), contexts.flatten(), reduction="sum") / contexts.shape[1]
        (grad,) = torch.autograd.grad(loss, memory, create_graph=is_second)
        memory = memory - RATE * grad
    inputs = torch.cat([memory, embed(queries)], 1)
    logits = backbone(inputs_embeds=inputs, use_cache=False).logits[:, last + 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1), queries[:, 1:].flatten())


def variants(shape: Shape, steps: int) -> dict[str, tuple[GradMemGPTForCausalLM, Callable[[], Tensor]]]:
    """The model of each variant, and what computes its loss."""
    model, rows = shape.model().train(), shape.rows()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    found: dict[str, tuple[GradMemGPTForCausalLM, Callable[[], Tensor]]] = {
        PLAIN: (plain, lambda: plain_loss(plain, rows, steps)),
        "plain first order": (plain, lambda: plain_loss(plain, rows, steps, is_second=False)),
    }
    for name, options in MODES.items():
        config = GradMemConfig(**{**model.config.to_dict(), "base_config": model.config.base_config, **options})
        one = GradMemGPTForCausalLM(copy.deepcopy(config)).train()
        one.load_state_dict(model.state_dict())
        found[name] = one, lambda one=one: one(K=steps, **rows).loss
    for one, _ in found.values():
        for parameter in one.parameters():
            parameter.grad = torch.zeros_like(parameter)
    return found


def check_gradients(every: dict[str, tuple[GradMemGPTForCausalLM, Callable[[], Tensor]]]) -> None:
    """AssertionError if second order of ours is not the plain way's, or first order is not."""
    found = {}
    for name, (one, loss) in every.items():
        one.zero_grad(set_to_none=False)
        loss().backward()
        found[name] = {n: p.grad.clone() for n, p in one.named_parameters()}
    pairs = [(name, PLAIN) for name in every if "second" in name] + [("first", "plain first order")]
    for ours, plain in pairs:
        for name, grad in found[plain].items():
            gap = float((found[ours][name] - grad).norm() / grad.norm())
            assert gap < 1e-3, f"{ours}: the gradient of {name} is {gap:.1e} from that of {plain}"


def measure(shape: Shape, steps: int, rounds: int) -> tuple[dict[str, Times], dict[str, int]]:
    every = variants(shape, steps)
    check_gradients(every)
    peaks = {name: peak_bytes(lambda loss=loss: loss().backward())[0] for name, (_, loss) in every.items()}
    runs = {name: Variant(lambda loss=loss: loss().backward()) for name, (_, loss) in every.items()}
    return time_interleaved(runs, rounds), peaks


def tables(shape: Shape, numbers: list[int], rounds: int) -> str:
    found = {steps: measure(shape, steps, rounds) for steps in numbers}
    names = list(next(iter(found.values()))[0])
    seconds, memory = [], []
    for name in names:
        times = [all_times for all_times, _ in found.values()]
        cells = (f"{t[name].ratio(t[PLAIN], 'cpu'):.2f} ({statistics.median(t[name].cpu):.3f} s)" for t in times)
        seconds.append([name, *cells])
        peaks = [all_peaks for _, all_peaks in found.values()]
        memory.append([name, *(f"{peak[name] / peak[PLAIN]:.2f} ({peak[name] / MIB:.0f} MiB)" for peak in peaks)])
    heads = [f"K = {steps}" for steps in numbers]
    return "\n\n".join(
        [
            str(shape),
            markdown_table([f"CPU time ÷ {PLAIN}", *heads], seconds),
            markdown_table([f"peak memory ÷ {PLAIN}", *heads], memory),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, help="instead of the shapes' own")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="K")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    check_peak_bytes()
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    parts = []
    for name in args.shapes:
        parts.append(tables(replace(SHAPES[name], **given), args.steps, args.rounds))
        print(f"{parts[-1]}\n", flush=True)
    print(environment())
    if args.output:
        args.output.write_text("\n\n".join([*parts, environment()]) + "\n")


if __name__ == "__main__":
    main()
