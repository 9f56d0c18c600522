"""Cost of a GRIT training step, in time and memory, beside LoRA and its relatives.

```
python benchmarks/grit_step.py [--shapes d512 smollm2] [--rounds 8] [--output table.md]
```

A step is forward, backward, AdamW and zero_grad on the same model, batch and adapter rank; the learning rate is tiny,
so all variants keep doing the same arithmetic. All variants run in one process and in interleaved rounds of ten steps,
so that everything that happens every fifth or tenth step is in. "The seed's way" gathers the same statistics as the
paper's code does: it multiplies inputs with Aᵀ and output gradients with B once more.

Last, the time to cut all layers of the model at once.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Variant, environment, markdown_table, peak_bytes, smollm2, time_interleaved
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gradtools import GritConfig, GritController


RANK = 16
STEPS = 10  # in a round: twice the default interval of statistics, once that of new eigenbases
COMMON = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LORA = {"r": RANK, "lora_alpha": 2 * RANK, **COMMON}
NEVER = 10**9


def llama(width: int, layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 64,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, S tokens in each of B rows."""

    title: str
    build: Callable[[], nn.Module]
    tokens: int
    batch: int
    rounds: int


SHAPES = {
    "d256": Shape("Llama d=256 L=4, S=128, B=8", partial(llama, 256, 4), 128, 8, 8),
    "d512": Shape("Llama d=512 L=4, S=128, B=8", partial(llama, 512, 4), 128, 8, 6),
    "d768": Shape("Llama d=768 L=4, S=128, B=8", partial(llama, 768, 4), 128, 8, 4),
    "smollm2": Shape("SmolLM2-135M (d=576, L=30), S=128, B=4", smollm2, 128, 4, 2),
}


class Workload:
    """One adapter and its optimizer on a copy of the base; a run is ten steps."""

    def __init__(self, base: nn.Module, config: Any, batch: dict[str, torch.Tensor], riemannian: bool = False):
        torch.manual_seed(0)
        self.model = get_peft_model(copy.deepcopy(base), config).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zero otherwise, and with it every gradient of A
                parameter.data.normal_(std=0.02)
        if riemannian:
            self.optimizer = create_riemannian_optimizer(self.model, torch.optim.AdamW, lr=1e-6, weight_decay=0.0)
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
        self.batch, self.count, self.step = batch, 0, self.plain_step

    def plain_step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def adalora_step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.count += 1
        self.model.base_model.update_and_allocate(min(self.count, 900))
        self.optimizer.zero_grad()

    def run(self) -> None:
        for _ in range(STEPS):
            self.step()


@contextmanager
def seeds_statistics(model: nn.Module, every: int) -> Iterator[None]:
    """Σ_a and Σ_g from layer inputs and output gradients, with the products that LoRA's own pass has made already."""
    handles, sums, calls = [], {}, {}

    def attach(layer: Any) -> None:
        sums[layer.name] = torch.zeros(2, layer.rank, layer.rank)
        calls[layer.name] = 0

        def forward(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            calls[layer.name] += 1
            if calls[layer.name] % every == 0:
                x = args[0].detach().flatten(0, 1)
                output.register_hook(partial(backward, x))

        def backward(x: torch.Tensor, grad: torch.Tensor) -> None:
            a, b = x @ layer.A.detach().mT, grad.flatten(0, 1) @ layer.B.detach()
            sums[layer.name][0].addmm_(a.mT, a)
            sums[layer.name][1].addmm_(b.mT, b)

        handles.append(layer.module.register_forward_hook(forward))

    for layer in model.base_model.layers():
        attach(layer)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def variants(base: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, tuple[Workload, Variant]]:
    def plain(config: Any, **options: Any) -> tuple[Workload, Variant]:
        work = Workload(base, config, batch, **options)
        return work, Variant(work.run)

    def grit(**options: Any) -> tuple[Workload, Variant]:
        # No cut: afterwards steps would be cheaper than LoRA's.
        work = Workload(base, GritConfig(**LORA, **{"reprojection_warmup_steps": NEVER, **options}), batch)
        return work, Variant(work.run, lambda: attached(GritController(work.model, work.optimizer)))

    def seed(every: int) -> tuple[Workload, Variant]:
        off = {"preconditioner": None, "reprojection": None}
        work = Workload(base, GritConfig(**LORA, **off), batch)
        return work, Variant(work.run, lambda: seeds_statistics(work.model, every))

    adalora = AdaLoraConfig(init_r=RANK, target_r=8, lora_alpha=32, tinit=0, tfinal=100, total_step=1000, **COMMON)
    result = {
        "LoRA": plain(LoraConfig(**LORA)),
        "**GRIT** (default: statistics every 5th step)": grit(),
        "GRIT, statistics every step": grit(grit_cov_update_freq=1),
        "GRIT, statistics every step, nothing else": grit(grit_cov_update_freq=1, preconditioner=None),
        "GRIT, kfac": grit(preconditioner="kfac"),
        "the seed's way of statistics, every step": seed(1),
        "the seed's way of statistics, every 15th": seed(15),
        "Riemannian LoRA": plain(LoraConfig(**LORA), riemannian=True),
        "AdaLoRA": plain(adalora),
        "DoRA": plain(LoraConfig(**LORA, use_dora=True)),
    }
    work, _ = result["AdaLoRA"]
    work.step = work.adalora_step
    return result


@contextmanager
def attached(controller: GritController) -> Iterator[None]:
    """A controller for one round. Its bases are known from the start, as they are in all but the first steps."""
    controller.attach()
    try:
        yield
    finally:
        controller.detach()


def measure(shape: Shape, rounds: int | None, only: list[str] | None) -> str:
    torch.manual_seed(0)
    base = shape.build()
    ids = torch.randint(1, 8000, (shape.batch, shape.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    every = variants(base, batch)
    if only is not None:
        every = {name: one for name, one in every.items() if name == "LoRA" or any(part in name for part in only)}
    for work, variant in every.values():  # warm, so that optimizer states exist
        with variant.installed():
            work.step()
    peaks = {}
    for name, (work, variant) in every.items():
        with variant.installed():
            peaks[name] = peak_bytes(work.step)[0]
    times = time_interleaved({name: variant for name, (_, variant) in every.items()}, rounds or shape.rounds)
    rows = [
        [
            name,
            f"{times[name].ratio(times['LoRA'], 'cpu'):.3f}",
            f"{times[name].ratio(times['LoRA'], 'wall'):.3f}",
            f"{peaks[name] / peaks['LoRA']:.3f}",
        ]
        for name in every
    ]
    table = markdown_table(["variant", "CPU time ÷ LoRA", "wall time ÷ LoRA", "peak memory ÷ LoRA"], rows)
    seconds, layers = time_of_cut(Workload(base, GritConfig(**LORA), batch))
    return f"{shape.title}, r={RANK}\n\n{table}\n\nCutting all {layers} layers to rank 8: {seconds:.2f} s"


def time_of_cut(work: Workload) -> tuple[float, int]:
    with GritController(work.model, work.optimizer, total_steps=NEVER) as controller:
        work.step()
        start = time.perf_counter()
        cuts = controller.cut(RANK // 2)
        return time.perf_counter() - start, len(cuts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--variants", nargs="+", help="parts of names; default all; LoRA is always there")
    parser.add_argument("--rounds", type=int, help="default by shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = []
    for name in args.shapes:
        tables.append(measure(SHAPES[name], args.rounds, args.variants))
        print(f"{tables[-1]}\n", flush=True)
    print(environment())
    if args.output:
        args.output.write_text("\n\n".join([*tables, environment()]) + "\n")


if __name__ == "__main__":
    main()
