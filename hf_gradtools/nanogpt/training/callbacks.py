"""What happens between iterations: when to log and evaluate, how long they take, what is shown."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_gradtools.nanogpt.training.options import TrainOptions
from hf_gradtools.workflow.display import Display


__all__ = ["LossDisplay", "Pace"]


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


class LossDisplay(Display):
    """A line of losses on each evaluation."""

    def describe(self, state: TrainerState, logs: dict[str, Any]) -> str:
        train = "" if self.train_loss is None else f", train loss {self.train_loss:.4f}"
        return f"iter {state.global_step}: val loss {logs['eval_loss']:.4f}{train}"
