"""What a training run shows: a bar, and a line on each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState


__all__ = ["Display"]


class Display(TrainerCallback):
    """A progress bar, and a line on each evaluation, which a subclass words in `describe`.

    Args:
        progress (`bool`): whether to show the bar.
        echo (`Callable`): takes the lines.
    """

    def __init__(self, progress: bool, echo: Callable[[str], None]):
        self.progress, self.echo = progress, echo
        self.bar: Any = None
        self.train_loss: float | None = None

    def describe(self, state: TrainerState, logs: dict[str, Any]) -> str:
        """The line on an evaluation, whose figures are in `logs`."""
        raise NotImplementedError

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
            self.say(self.describe(state, logs))

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
