"""Cost of per-sample dot products in a training step, against the plain step and against other ways to get them.

```
python benchmarks/ghost_dot_prod.py [--shapes d256-S64 ...] [--variants auto loop ...] [--rounds 5] [--output table.md]
```

A step is forward, backward, AdamW and zero_grad in float32. The learning rate is 0: the arithmetic is the same, and
every variant sees the same weights in every round, so all their values can be compared. All that score take a fresh
gradient of the same validation batch in each step, by the same function.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    Times,
    Variant,
    check_peak_bytes,
    environment,
    gpt2,
    markdown_table,
    peak_bytes,
    random_rows,
    smollm2,
    smollm2_lora,
    time_interleaved,
)  # fmt: skip
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from hf_gradtools import GhostDotProdCallback
from hf_gradtools.ghost.engine import GhostDotProd
from hf_gradtools.ghost.validation import model_loss, validation_gradient


BASELINE = "concat"
TOLERANCE = 1e-4
MAX_BYTES = 12 * 2**30
TRAINER_STEPS = 4


@dataclass(frozen=True)
class Shape:
    """What is trained: a model, S tokens in each of B rows, and max(1, B // 4) validation rows as long."""

    title: str
    build: Callable[[], nn.Module]
    tokens: int
    batch: int
    rounds: int
    trainer_rounds: int = 0

    @property
    def val_batch(self) -> int:
        return max(1, self.batch // 4)


SHAPES = {
    "d256-S64": Shape("GPT-2 d=256 L=4", partial(gpt2, 256, 4), tokens=64, batch=16, rounds=15, trainer_rounds=3),
    "d256-S256": Shape("GPT-2 d=256 L=4", partial(gpt2, 256, 4), tokens=256, batch=16, rounds=7, trainer_rounds=2),
    "d512-S512": Shape("GPT-2 d=512 L=4", partial(gpt2, 512, 4), tokens=512, batch=8, rounds=3, trainer_rounds=1),
    "smollm2-lora": Shape("SmolLM2-135M LoRA r=8", smollm2_lora, tokens=256, batch=4, rounds=2),
    "smollm2-full": Shape("SmolLM2-135M full", smollm2, tokens=256, batch=4, rounds=2),
}


# ---- the variants


class Bench:
    """One model with its batches, and a step of it in each way. Steps that score return the dot products, `[B]`."""

    def __init__(self, shape: Shape):
        torch.manual_seed(0)
        self.shape = shape
        self.model = shape.build().train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self.ids = torch.randint(1, 8000, (shape.batch + shape.val_batch, shape.tokens))
        self.train_batch, self.val_batch = self.batch(slice(shape.batch)), self.batch(slice(shape.batch, None))

    def batch(self, rows: slice) -> dict[str, Tensor]:
        return {"input_ids": self.ids[rows], "labels": self.ids[rows]}

    def validation(self) -> list[Tensor]:
        return validation_gradient(self.model, self.parameters, [(self.val_batch, 1)], model_loss)

    def plain(self) -> None:
        model_loss(self.model, self.train_batch).backward()

    def concat(self) -> None:
        model_loss(self.model, self.batch(slice(None))).backward()

    def floor(self) -> None:
        self.validation()
        self.plain()

    def engine(self, engine: GhostDotProd) -> Tensor:
        engine.validate(self.val_batch)
        self.plain()
        return engine.scores().dots[0]

    def vmap(self) -> Tensor:
        """Per-sample gradients of the whole model by torch.func, then dot products and sum."""
        target = self.validation()
        parameters = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

        def share(values: dict[str, Tensor], ids: Tensor) -> Tensor:
            batch = {"input_ids": ids[None], "labels": ids[None]}
            return functional_call(self.model, values, (), batch)["loss"] / self.shape.batch

        grads = vmap(grad(share), in_dims=(None, 0))(parameters, self.train_batch["input_ids"])
        dots = sum(grads[n].flatten(1) @ t.flatten() for n, t in zip(parameters, target, strict=True))
        for p, name in zip(self.parameters, parameters, strict=True):
            p.grad = grads[name].sum(0)
        return dots

    def loop(self) -> Tensor:
        """One backward pass per sample."""
        target, dots = self.validation(), []
        for n in range(self.shape.batch):
            loss = model_loss(self.model, self.batch(slice(n, n + 1))) / self.shape.batch
            grads = torch.autograd.grad(loss, self.parameters)
            dots.append(sum(torch.dot(g.flatten(), t.flatten()) for g, t in zip(grads, target, strict=True)))
            for p, g in zip(self.parameters, grads, strict=True):
                p.grad = g if p.grad is None else p.grad.add_(g)
        return torch.stack(dots)

    def step(self, backward: Callable[[], Tensor | None]) -> Tensor | None:
        dots = backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dots

    def variants(self, names: Iterable[str]) -> dict[str, Variant]:
        return {name: self.variant(name) for name in names if name != "vmap" or self.vmap_bytes() < MAX_BYTES}

    def variant(self, name: str) -> Variant:
        if name not in ENGINE_METHODS:
            return Variant(partial(self.step, getattr(self, name)))
        engine = GhostDotProd(self.model, method=name)
        return Variant(partial(self.step, partial(self.engine, engine)), lambda: engine)

    def vmap_bytes(self) -> int:
        """About what vmap needs (measured): the per-sample gradients, some of them several times for a while."""
        return 3 * self.shape.batch * self.scored_bytes()

    def scored_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters)


ENGINE_METHODS = ("auto", "contraction", "gram")
TITLES = {
    "plain": "plain step, B rows",
    "concat": "plain step, B + Bv rows (baseline)",
    "floor": "validation gradient, then plain step; no dots",
    "auto": "**ours, method=auto**",
    "contraction": "ours, method=contraction",
    "gram": "ours, method=gram",
    "vmap": "torch.func vmap(grad)",
    "loop": "one backward pass per sample",
}
SCORING = (*ENGINE_METHODS, "vmap", "loop")


# ---- measurements


@dataclass
class Result:
    """Of one shape: by variant, and where the variant scores, its largest error against the loop."""

    shape: Shape
    scored_bytes: int
    times: dict[str, Times]
    peaks: dict[str, int]
    errors: dict[str, float]
    left_out: str


def measure(shape: Shape, names: list[str], rounds: int | None) -> Result:
    bench = Bench(shape)
    bench.step(bench.plain)  # the optimizer's state exists from here on
    wanted = [name for name in TITLES if name in {*names, "plain", "loop", BASELINE}]
    variants = bench.variants(wanted)
    peaks, dots = {}, {}
    for name, variant in variants.items():
        # "auto" knows its shapes, and still holds the last validation gradient, from the second step on.
        steps = 2 if name in ENGINE_METHODS else 1
        with variant.installed():
            peaks[name], dots[name] = peak_bytes(lambda run=variant.run, steps=steps: [run() for _ in range(steps)])
    errors = {name: compare(name, dots[name], dots["loop"][0]) for name in variants if name in SCORING}
    timed = {name: variant for name, variant in variants.items() if name in {*names, BASELINE}}
    times = time_interleaved(timed, rounds or shape.rounds)
    too_large = "vmap" in wanted and "vmap" not in variants
    left_out = f"vmap(grad) would need about {bench.vmap_bytes() / 2**30:.0f} GiB" if too_large else ""
    return Result(shape, bench.scored_bytes(), times, peaks, errors, left_out)


def compare(name: str, found: list[Tensor], expected: Tensor) -> float:
    """Largest error over the largest value.

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    error = max(float((dots.double() - expected.double()).abs().max() / expected.abs().max()) for dots in found)
    if error > TOLERANCE:
        raise RuntimeError(
            f"variant {name!r} is off by {error:.1e} of the largest value; at most {TOLERANCE} is right"
        )
    return error


class StepTimes(TrainerCallback):
    """CPU and wall time from the end of one step to the end of the next: data, hooks and callbacks included."""

    def __init__(self, times: Times):
        self.times = times
        self.last: tuple[float, float] | None = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time(), time.perf_counter()
        if self.last is not None:
            self.times.cpu.append(now[0] - self.last[0])
            self.times.wall.append(now[1] - self.last[1])
        self.last = now


def measure_trainer(shape: Shape, rounds: int) -> dict[str, Times]:
    """Steps of a real `Trainer`, alone (on B, and on B + Bv rows per step) and with the callback, in turns."""
    torch.manual_seed(0)
    model = shape.build()
    names = ("plain", BASELINE, "auto")
    times = {name: Times() for name in names}
    for _ in range(rounds):
        for name in names:
            batch = shape.batch + shape.val_batch * (name == BASELINE)
            with tempfile.TemporaryDirectory() as folder:
                callbacks: list[TrainerCallback] = [StepTimes(times[name])]
                if name == "auto":
                    val = random_rows(shape.val_batch, shape.tokens, seed=1)
                    callbacks.insert(0, GhostDotProdCallback(val, output_dir=f"{folder}/ghost"))
                args = TrainingArguments(
                    output_dir=folder, per_device_train_batch_size=batch, max_steps=TRAINER_STEPS + 1,
                    save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
                )  # fmt: skip
                rows = random_rows(batch * (TRAINER_STEPS + 1), shape.tokens, seed=0)
                trainer = Trainer(model=copy.deepcopy(model), args=args, train_dataset=rows, callbacks=callbacks)
                trainer.remove_callback(PrinterCallback)
                trainer.train()
    return times


# ---- tables

STEP_HEADERS = ["step", "CPU s", "wall s", "CPU ratio", "wall ratio"]
STEP_HEADERS += ["peak MiB", "peak ratio", "over plain, in G", "error"]
TRAINER_HEADERS = ["Trainer with the callback", "CPU ratio", "wall ratio", "CPU ratio to B rows alone"]


def step_table(result: Result) -> str:
    baseline, peaks = result.times[BASELINE], result.peaks
    rows = []
    for name, times in result.times.items():
        copies = (peaks[name] - peaks["plain"]) / result.scored_bytes
        rows.append([
            TITLES[name],
            *map(seconds, (times.cpu, times.wall)),
            *[f"{times.ratio(baseline, clock):.2f}" for clock in ("cpu", "wall")],
            f"{peaks[name] / MIB:.0f}",
            f"{peaks[name] / peaks[BASELINE]:.2f}",
            f"{copies:+.2f}" if name in SCORING else "",
            "" if name not in SCORING else "reference" if name == "loop" else f"{result.errors[name]:.0e}",
        ])  # fmt: skip
    title = f"**{heading(result.shape)}**, {len(baseline.cpu)} rounds"
    if result.left_out:
        title += f"; {result.left_out}"
    return f"{title}\n\n{markdown_table(STEP_HEADERS, rows)}"


def trainer_row(shape: Shape, times: dict[str, Times]) -> list[str]:
    ratios = [times["auto"].ratio(times[BASELINE], clock) for clock in ("cpu", "wall")]
    ratios.append(times["auto"].ratio(times["plain"], "cpu"))
    return [heading(shape), *[f"{ratio:.2f}" for ratio in ratios]]


def heading(shape: Shape) -> str:
    return f"{shape.title}, S={shape.tokens}, B={shape.batch}, Bv={shape.val_batch}"


def seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--rounds", type=int, help="timed rounds of every shape (default: about 10 minutes in all)")
    parser.add_argument("--no_trainer", action="store_true", help="leave the runs of a real Trainer out")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    check_peak_bytes()
    disable_progress_bar()
    parts, trainer_rows = [], []
    for name in options.shapes:
        shape = SHAPES[name]
        parts.append(step_table(measure(shape, options.variants, options.rounds)))
        print(parts[-1], end="\n\n", flush=True)
        if shape.trainer_rounds and not options.no_trainer:
            rounds = min(options.rounds or shape.trainer_rounds, shape.trainer_rounds)
            trainer_rows.append(trainer_row(shape, measure_trainer(shape, rounds)))
    if trainer_rows:
        parts.append(markdown_table(TRAINER_HEADERS, trainer_rows))
    parts.append(environment())
    print("\n\n".join(parts[len(options.shapes) :]))
    if options.output:
        options.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
