"""A `Trainer` whose checkpoints are there whole or not at all, and whose folder holds the model of the best one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_gradtools.workflow.checkpoints import checkpoint_folder, prune, publish, write_folder
from hf_gradtools.workflow.terminal import no_bars


__all__ = ["CheckpointingTrainer"]


class CheckpointingTrainer(Trainer):
    """A `Trainer` that may be killed at any moment: see [`~hf_gradtools.workflow.checkpoints`].

    A subclass keeps `state.best_global_step`, whose checkpoint stays and whose model is copied to `output_dir`; the
    model of a resumed run is made of the checkpoint before the trainer is.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model of a resumed run was made from the checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        folder = checkpoint_folder(output_dir, step)
        if self.args.world_size == 1:
            write_folder(folder, self._fill_checkpoint)
        else:
            self._save_together(folder)
        if self.args.should_save:
            if step == self.state.best_global_step:
                publish(folder, output_dir)
            prune(output_dir, {step, self.state.best_global_step})

    def _save_together(self, folder: Path) -> None:
        """Each process adds the state of its random numbers before the folder takes its name."""
        others = folder.with_name(f".{folder.name}.processes")
        self._save_rng_state(str(others))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:

            def fill(unfinished: Path) -> None:
                self._fill_checkpoint(unfinished)
                for path in others.iterdir():
                    path.rename(unfinished / path.name)
                others.rmdir()

            write_folder(folder, fill)
        self.accelerator.wait_for_everyone()

    def _fill_checkpoint(self, folder: Path) -> None:
        self._save(str(folder))
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        if self.args.world_size == 1:
            self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Model and tokenizer as `from_pretrained` reads them, without the pickled arguments that Trainer adds."""
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        use_cache, model.config.use_cache = model.config.use_cache, True  # off while it trains
        try:
            with no_bars():
                model.save_pretrained(output_dir, state_dict=state_dict)
        finally:
            model.config.use_cache = use_cache
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
