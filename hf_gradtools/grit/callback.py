"""`GritCallback`: steers any `Trainer` that trains a GRIT adapter."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_gradtools.core.quantized import keep_quantized_gradients
from hf_gradtools.core.store import write_json_atomically
from hf_gradtools.grit.card import TAGS, write_grit_card
from hf_gradtools.grit.controller import GritController
from hf_gradtools.grit.report import figures, rank_report
from hf_gradtools.grit.state import load_state, save_state


if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from transformers import Trainer


logger = logging.getLogger(__name__)

RANKS_FILE = "grit_ranks.json"


class GritCallback(TrainerCallback):
    """Attaches a [`GritController`] to the model and optimizer of any `Trainer`, TRL's included.

    ```python
    SFTTrainer(model, args, train_dataset=ds, peft_config=GritConfig(), callbacks=[GritCallback()]).train()
    ```

    Writes the controller's state into every checkpoint and takes it up again on resuming, and `grit_ranks.json` to
    `output_dir` when training ends. [`GritTrainer`] has it built in.

    Args:
        trainer: logs the figures (`grit/...`) beside the loss, so that `report_to` has them; also by `set_trainer`.
        resume_from_checkpoint: where to take the state from when training resumes; default the checkpoint of that
            step in `output_dir`.

    Attributes:
        controller: the controller of the current or last run.
    """

    def __init__(self, trainer: Trainer | None = None, resume_from_checkpoint: str | None = None):
        self.controller: GritController | None = None
        self.resume_from_checkpoint = resume_from_checkpoint
        self._trainer = trainer
        self._logged_step = -1

    def set_trainer(self, trainer: Trainer) -> None:
        """Lets the callback log through `trainer.log`."""
        self._trainer = trainer

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # For good: evaluating first, or merging afterwards, would go wrong as well.
        keep_quantized_gradients(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()  # of a run that was interrupted
        if args.n_gpu > 1:
            raise ValueError("GRIT does not run under nn.DataParallel; start one process per GPU with torchrun.")
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        controller = GritController(
            model,
            optimizer,
            total_steps=state.max_steps,
            accumulation_steps=args.gradient_accumulation_steps,
            grad_scale=lambda: 1.0 if scaler is None else scaler.get_scale(),
        )
        if state.global_step > 0 and not controller.config.is_passive:
            load_state(controller, self.resume_from_checkpoint or _checkpoint(args, state))
        controller.attach()
        self.controller = controller
        _tag(controller)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.controller is not None:
            self.controller.begin_step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Once per step with a loss; what is logged here comes back to this method, without one.
        new = "loss" in (kwargs.get("logs") or {}) and state.global_step != self._logged_step
        if self._trainer is not None and self.controller is not None and new:
            self._logged_step = state.global_step
            self._trainer.log({f"grit/{name}": value for name, value in figures(self.controller).items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.controller is not None and state.is_world_process_zero and not self.controller.config.is_passive:
            save_state(self.controller, _checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        controller = self.controller
        if controller is None:
            return
        self.close()
        if args.load_best_model_at_end and state.best_model_checkpoint and not controller.config.is_passive:
            load_state(controller, state.best_model_checkpoint)  # the adapter is that checkpoint's by now
        controller.finish()
        report = rank_report(controller)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_json_atomically(Path(args.output_dir) / RANKS_FILE, report)
        logger.info(
            "adapter parameters: %s before, %s after training (%.1f %% fewer)",
            f"{report['base_parameters']:,}", f"{report['parameters']:,}", 100 * report["reduction"],
        )  # fmt: skip
        if self._trainer is not None:
            self._trainer.log(
                {f"grit/{name}": report[name] for name in ("base_parameters", "parameters", "reduction")}
            )

    def write_card(self, folder: str | os.PathLike[str], **options: Any) -> ModelCard | None:
        """Writes the adapter's model card to `README.md` of a folder.

        `trainer.push_to_hub()` of another Trainer writes a card of its own, and `model.push_to_hub()` keeps the one
        that the Hub has; so send this one after the adapter:

        ```python
        trainer.push_to_hub()
        callback.write_card(args.output_dir, model_name="user/adapter").push_to_hub("user/adapter")
        ```

        Args:
            folder: of the adapter.
            **options: of [`~hf_gradtools.grit.card.write_grit_card`], such as `license` and `datasets`.

        Returns:
            the card; `None` in processes other than the first, which write nothing.

        Raises:
            ValueError: nothing has been trained yet.
        """
        if self.controller is None:
            raise ValueError("there is no controller before training, so there are no ranks to write. Call train().")
        return write_grit_card(folder, self.controller, self._trainer, **options)

    def close(self) -> None:
        """Removes all hooks; needed only after training was interrupted by an exception."""
        if self.controller is not None:
            self.controller.detach()


def _tag(controller: GritController) -> None:
    """PEFT rewrites a card's tags whenever it saves, and of a base model's own it takes them over."""
    add_model_tags = getattr(controller.tuner.model, "add_model_tags", None)
    if add_model_tags is not None:  # only transformers' models have them
        add_model_tags(list(TAGS))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of this step's checkpoint; a hyperparameter search has one more level."""
    name = f"checkpoint-{state.global_step}"
    nested = sorted(Path(args.output_dir).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    direct = Path(args.output_dir) / name
    return nested[-1] if nested and not direct.is_dir() else direct
