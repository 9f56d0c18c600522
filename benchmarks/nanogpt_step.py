"""CPU time of a training step beside a bare nanoGPT loop: same sizes, batch, optimiser, clipping and schedule.

```
python benchmarks/nanogpt_step.py [--shapes small large] [--positions absolute] [--rounds 12] [--output table.md]
```

The bare loop is one function around a hand-written model (`bare_nanogpt.py`). Ours trains as `hf-gradtools nanogpt
train` does, and transformers' GPT-2 in the Trainer as it comes, both reading data, clipping and logging every tenth
step; litgpt's model trains in the bare loop. Every loop sits in a thread of its own and is let go for a few steps in
turn, so that all meet the same minutes of the machine and only one runs at a time. What counts is CPU time of the
process, and the median over the rounds of the ratio to the bare loop in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bare_nanogpt import LoopOptions, training_steps
from common import environment, markdown_table
from nanogpt_models import (
    HOW_TO_LITGPT,
    SHAPES,
    Shape,
    bare,
    has_litgpt,
    hf_gpt2,
    litgpt,
    litgpt_loss,
    malloc_settings,
    ours,
)
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_gradtools.nanogpt.data import TokenFolder
from hf_gradtools.nanogpt.training import TrainOptions
from hf_gradtools.nanogpt.training.trainer import BlockTrainer
from hf_gradtools.nanogpt.training.workflow import training_arguments


BARE = "bare loop"
OPTIONS = LoopOptions()
FOREVER = 10**5  # steps; the loops are stopped from outside
Work = Callable[[Callable[[], None]], None]


class _Stop(BaseException):
    """Ends a loop from within; no loop catches it."""


class Stepper:
    """A training loop in a thread that runs only while `advance` waits for it.

    Args:
        work: runs the loop and calls what it is given after every step.
    """

    def __init__(self, work: Work):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._failed = 0, None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Work) -> None:
        self._go.acquire()
        torch.set_num_threads(self._threads)  # OpenMP keeps the number by thread
        try:
            work(self._tick)
            raise RuntimeError("the loop ended by itself")
        except _Stop:
            pass
        except Exception as error:
            self._failed = error
        self._done.release()

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._done.release()
            self._go.acquire()
            if self._left < 0:
                raise _Stop

    def advance(self, steps: int) -> float:
        """Lets the loop make `steps` steps; returns their CPU seconds."""
        self._left = steps
        start = time.process_time()
        self._go.release()
        self._done.acquire()
        if self._failed is not None:
            raise self._failed
        return time.process_time() - start

    def stop(self) -> None:
        self._left = -1
        self._go.release()
        self._thread.join()


class _Ticking(TrainerCallback):
    def __init__(self, tick: Callable[[], None]):
        self._tick = tick

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._tick()


class _Rows(Dataset):
    """Rows at random offsets, for a model that shifts its labels itself."""

    def __init__(self, tokens: np.ndarray, block_size: int):
        self.tokens, self.block_size = tokens, block_size

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, _: int) -> dict[str, Tensor]:
        start = int(torch.randint(len(self.tokens) - self.block_size, ()))
        row = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        return {"input_ids": row, "labels": row}


def bare_loop(model: nn.Module, tokens: np.ndarray, shape: Shape, **options: Any) -> Work:
    def work(tick: Callable[[], None]) -> None:
        for _ in training_steps(model, tokens, OPTIONS, FOREVER, block_size=shape.block_size, **options):
            tick()

    return work


def our_trainer(model: nn.Module, data: TokenFolder, shape: Shape, folder: Path) -> Work:
    """What `hf-gradtools nanogpt train` runs, without evaluations and checkpoints on the way."""

    def work(tick: Callable[[], None]) -> None:
        options = TrainOptions(
            dataset=str(data.path), out_dir=str(folder), batch_size=shape.batch_size, max_iters=FOREVER,
            lr_decay_iters=FOREVER, eval_interval=FOREVER, eval_iters=1, never_save_checkpoint=True,
            log_interval=OPTIONS.log_every_steps, learning_rate=OPTIONS.learning_rate, min_lr=OPTIONS.min_lr,
            warmup_iters=OPTIONS.warmup_steps, weight_decay=OPTIONS.weight_decay, beta2=0.99,
            grad_clip=OPTIONS.grad_clip, device="cpu", progress=False,
        )  # fmt: skip
        arguments = training_arguments(options)
        trainer = BlockTrainer(model, arguments, options, data, shape.block_size, echo=lambda line: None)
        run(trainer, tick)

    return work


def plain_trainer(model: nn.Module, tokens: np.ndarray, shape: Shape, folder: Path) -> Work:
    """Trainer as it comes, with the numbers of the bare loop."""

    def work(tick: Callable[[], None]) -> None:
        args = TrainingArguments(
            folder, per_device_train_batch_size=shape.batch_size, max_steps=FOREVER, use_cpu=True, report_to="none",
            learning_rate=OPTIONS.learning_rate, lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": OPTIONS.min_lr}, warmup_steps=OPTIONS.warmup_steps, adam_beta2=0.99,
            weight_decay=OPTIONS.weight_decay, max_grad_norm=OPTIONS.grad_clip, save_strategy="no",
            logging_steps=OPTIONS.log_every_steps, disable_tqdm=True,
        )  # fmt: skip
        run(Trainer(model, args, train_dataset=_Rows(tokens, shape.block_size)), tick)

    return work


def run(trainer: Trainer, tick: Callable[[], None]) -> None:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Ticking(tick))
    trainer.train()


def loops(shape: Shape, positions: str, folder: Path) -> dict[str, Work]:
    for split in ("train", "val"):
        tokens = np.random.default_rng(0).integers(shape.vocab_size, size=10**6)
        tokens.astype(np.uint16).tofile(folder / f"{split}.bin")
    data = TokenFolder(folder, "uint16", shape.vocab_size)
    tokens = data.tokens("train")
    result = {
        BARE: bare_loop(bare(shape, positions), tokens, shape),
        "**ours** in Trainer": our_trainer(ours(shape, positions), data, shape, folder / "out"),
        "GPT2LMHeadModel in Trainer (absolute)": plain_trainer(hf_gpt2(shape), tokens, shape, folder / "out"),
    }
    if has_litgpt():
        result["litgpt's GPT in the bare loop (rotary)"] = bare_loop(litgpt(shape), tokens, shape, loss_of=litgpt_loss)
    return result


def measure(shape: Shape, positions: str, rounds: int, steps: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        steppers = {name: Stepper(work) for name, work in loops(shape, positions, Path(folder)).items()}
        for stepper in steppers.values():
            stepper.advance(2 * OPTIONS.log_every_steps)  # set up, and the optimiser's state made
        seconds: dict[str, list[float]] = {name: [] for name in steppers}
        names = list(steppers)
        for start in range(rounds):
            turn = start % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name].append(steppers[name].advance(steps) / steps)
        for stepper in steppers.values():
            stepper.stop()
    return table(f"{shape}, {positions} positions", seconds)


def table(title: str, seconds: dict[str, list[float]]) -> str:
    rows = []
    for name, mine in seconds.items():
        ratios = sorted(m / b for m, b in zip(mine, seconds[BARE], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            [
                name,
                f"{statistics.median(mine) * 1e3:.2f}",
                f"{statistics.median(ratios):.3f}",
                f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}",
            ]
        )
    head = ["loop", "CPU ms a step", "÷ bare loop", "middle half of the rounds"]
    return f"{title}\n\n{markdown_table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--positions", default="absolute", choices=["absolute", "rotary"], help="of bare and ours")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=OPTIONS.log_every_steps, help="of each loop in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = []
    for name in args.shapes:
        tables.append(measure(SHAPES[name], args.positions, args.rounds, args.steps))
        print(f"{tables[-1]}\n", flush=True)
    tables.append(f"{environment()}; {malloc_settings()}")
    if not has_litgpt():
        tables.append(HOW_TO_LITGPT)
    print("\n\n".join(tables[len(args.shapes) :]))
    if args.output:
        args.output.write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
