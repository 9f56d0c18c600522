"""What happens between iterations: when to log and evaluate, how long they take, what is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_gradtools.nanogpt.training.options import TrainOptions


__all__ = ["Display", "Pace", "no_bars"]


class Pace(TrainerCallback):
    """Asks for logs and evaluations at nanoGPT's intervals, and takes the time of what lies between them.

    The first iteration of a process, in which memory is found and kernels are compiled, is left out if there are
    others. Time is taken from evaluation to evaluation: the clock is not read in each iteration, and an accelerator
    has finished when it is.
    """

    def __init__(self, options: TrainOptions):
        self.options = options
        self.iterations, self.seconds = 0, 0.0
        self._first_seconds: float | None = None
        self._begun: tuple[int, float] | None = None

    @property
    def iter_latency_ms(self) -> float | None:
        """Mean time of an iteration in milliseconds; None before there was one."""
        if self.iterations:
            return 1000 * self.seconds / self.iterations
        return None if self._first_seconds is None else 1000 * self._first_seconds

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._begun is None:
            self._begun = (state.global_step, _now(args))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, options = state.global_step, self.options
        if step % options.eval_interval == 0 or step == state.max_steps:
            control.should_evaluate = control.should_log = True
        elif step % options.log_interval == 0:
            control.should_log = True
        if control.should_evaluate or self._first_seconds is None:
            self._stop(step, _now(args))

    def _stop(self, step: int, now: float) -> None:
        assert self._begun is not None
        begun_step, begun = self._begun
        self._begun = None
        if self._first_seconds is None:
            self._first_seconds = now - begun
        else:
            self.iterations += step - begun_step
            self.seconds += now - begun


def _now(args: TrainingArguments) -> float:
    if args.device.type != "cpu":
        torch.accelerator.synchronize(args.device)
    return time.perf_counter()


class Display(TrainerCallback):
    """A progress bar, and a line on each evaluation.

    Args:
        progress (`bool`): whether to show the bar.
        echo (`Callable`): takes the lines.
    """

    def __init__(self, progress: bool, echo: Callable[[str], None]):
        self.progress, self.echo = progress, echo
        self.bar: Any = None
        self.train_loss: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="it", disable=not self.progress, leave=False
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.bar is None:
            return
        if "loss" in logs:
            self.train_loss = logs["loss"]
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
        if "eval_loss" in logs:
            train = "" if self.train_loss is None else f", train loss {self.train_loss:.4f}"
            self.say(f"iter {state.global_step}: val loss {logs['eval_loss']:.4f}{train}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def say(self, line: str) -> None:
        """Shows a line above the bar."""
        with tqdm.external_write_mode():
            self.echo(line)

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@contextmanager
def no_bars() -> Iterator[None]:
    """Keeps transformers from showing a bar for the files it reads and writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
