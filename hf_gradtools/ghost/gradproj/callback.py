"""`GradProjCallback`: projected gradients while `Trainer` trains, of its batches or of a dataset at chosen steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ... import __version__
from ...core import distributed
from ..identity import frozen_fingerprint
from ..models import model_name
from ..validation import LossFn, model_loss
from .batches import Collator
from .config import GradProjConfig
from .ensemble import GradientEnsemble
from .projector import GradProjector, finish_all_ranks
from .store import GradientStore
from .training import TrainingProjections
from .writer import GradientWriter


logger = logging.getLogger(__name__)


class GradProjCallback(TrainerCallback):
    """Stores projected per-sample gradients during training, in one of two ways.

    Without a dataset, the gradients of the training batches themselves, as they pass: a row per step and sample, at
    the cost of the projections alone. With one, the gradients of all its rows at the weights of chosen steps, a
    store for each in `output_dir/step-N`, which :meth:`ensemble` searches together (TracIn, LESS).

    Training is left as it is: weights end bit for bit as without the callback.

    ```python
    callback = GradProjCallback(train_rows, output_dir="out/gradients", on_save=True)
    Trainer(model, args, train_dataset=train_rows, callbacks=[callback]).train()
    callback.ensemble().search(queries, k=10)
    ```

    Args:
        dataset: rows, tokenized as those of training are; None for the training batches.
        output_dir: folder of the store, or of one store for each step.
        every_steps: how often; default every step for the training batches.
        steps: at these optimizer steps instead.
        on_save: a dataset at each checkpoint instead.
        data_collator: makes batches of the dataset's rows; default the trainer's.
        loss_fn: `loss_fn(model, batch)` for the dataset; default `model(**batch)["loss"]`.
        batch_size: rows of a forward pass over the dataset.
        sample_id_column: of the training rows, if they have one.
        config: the options, or give them by name:
        **options: fields of :class:`GradProjConfig`.

    Raises:
        ValueError: an option is out of range or does not go with another.
    """

    def __init__(
        self,
        dataset: Any = None,
        *,
        output_dir: str | os.PathLike[str],
        every_steps: int | None = None,
        steps: Collection[int] | None = None,
        on_save: bool = False,
        data_collator: Collator | None = None,
        loss_fn: LossFn = model_loss,
        batch_size: int = 8,
        sample_id_column: str = "sample_id",
        config: GradProjConfig | None = None,
        **options: Any,
    ):
        if config is not None and options:
            raise ValueError(f"give either config= or {', '.join(options)}, not both")
        self.config = config or GradProjConfig(**options)
        chosen = {"every_steps": every_steps, "steps": steps, "on_save": on_save or None}
        given = [name for name, value in chosen.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say when to project; pass one of them")
        if dataset is not None and not given:
            raise ValueError("dataset is given without when to project it: pass every_steps=, steps= or on_save=True")
        if dataset is None and on_save:
            raise ValueError("on_save=True projects a dataset at each checkpoint; pass dataset=")
        if dataset is not None and len(dataset) == 0:
            raise ValueError("dataset has 0 rows; GradProjCallback needs at least 1")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self.dataset, self.output_dir = dataset, Path(output_dir)
        self.every_steps, self.steps, self.on_checkpoints = every_steps, steps, on_save
        self.data_collator, self.loss_fn = data_collator, loss_fn
        self.batch_size, self.sample_id_column = batch_size, sample_id_column
        self._projector: GradProjector | None = None
        self._training: TrainingProjections | None = None
        self._writer: GradientWriter | None = None
        self._pending: dict[str, Any] | None = None

    # ---- results

    @property
    def store(self) -> GradientStore:
        """The rows of the training batches so far, also while training runs."""
        return GradientStore.open(self.output_dir)

    def ensemble(self, **options: Any) -> GradientEnsemble:
        """The stores of all chosen steps, weighed by their learning rates; see [`GradientEnsemble`]."""
        folders = sorted(self.output_dir.glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
        return GradientEnsemble([GradientStore.open(folder) for folder in folders], **options)

    # ---- events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()  # of a run that was interrupted
        if args.n_gpu > 1:
            raise ValueError(
                "GradProjCallback does not run under nn.DataParallel; start one process per GPU with "
                "`accelerate launch` or `torchrun`"
            )
        if args.deepspeed:
            raise ValueError("GradProjCallback needs whole parameters and DeepSpeed partitions them; train without it")
        model, dataloader = kwargs["model"], kwargs["train_dataloader"]
        loader = getattr(dataloader, "base_dataloader", dataloader)
        with self._closing_on_error():
            collator = self.data_collator or loader.collate_fn
            self._projector = GradProjector(model, data_collator=collator, loss_fn=self.loss_fn, config=self.config)
            self._optimizer = kwargs["optimizer"]
            if self.dataset is None:
                self._training = TrainingProjections(
                    self._projector, self._optimizer, dataloader, self.sample_id_column, self.close
                )
                self._writer = self._open_writer(model, state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pending = None
        if self._training is not None:
            self._training.begin_step(self._is_chosen(state.global_step + 1))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._training is None or not self._training.active:
            return
        with self._closing_on_error():
            self._pending = self._training.columns()
            rows = len(self._pending["sample_id"])
            self._pending["step"] = [state.global_step + 1] * rows
            self._pending["learning_rate"] = [self._learning_rate()] * rows

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._pending is not None and self._optimizer.step_was_skipped:
            logger.info("step %d was skipped by the loss scaler; its samples get no rows", state.global_step + 1)
            self._pending = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._pending is not None and self._writer is not None:
            with self._closing_on_error():
                self._pending["epoch"] = [float(state.epoch or 0.0)] * len(self._pending["step"])
                self._writer.append(self._pending)
            self._pending = None
        if self.dataset is not None and not self.on_checkpoints and self._is_chosen(state.global_step):
            self._project_dataset(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.dataset is not None and self.on_checkpoints:
            self._project_dataset(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._writer is not None:
            finish_all_ranks(self._writer)
        self.close()

    def close(self) -> None:
        """Takes every hook off the model and the dataloader. Training that ends or fails here does it by itself;
        call it after interrupting `trainer.train()` by Ctrl-C."""
        if self._training is not None:
            self._training.close()
        if self._writer is not None:
            self._writer.close()
        self._training, self._writer, self._projector, self._pending = None, None, None, None

    # ---- how

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """An exception ends training without another event: the model must be clean by then."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _is_chosen(self, step: int) -> bool:
        return step in self.steps if self.steps is not None else step % (self.every_steps or 1) == 0

    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _project_dataset(self, state: TrainerState) -> None:
        assert self._projector is not None
        # What the scheduler has set by now is for the next step, the one that these weights will take.
        extra = {"step": state.global_step, "learning_rate": self._learning_rate()}
        with self._closing_on_error():
            folder = self.output_dir / f"step-{state.global_step}"
            self._projector.project(self.dataset, output_dir=folder, batch_size=self.batch_size, extra=extra)

    def _open_writer(self, model: nn.Module, state: TrainerState) -> GradientWriter:
        assert self._projector is not None
        # Trainable weights are not part of it, since a resumed run starts from other ones.
        identity = {**self._projector.identity(), "weights": frozen_fingerprint(model)}
        identity["dataset"] = {"training_batches": True, "world_size": distributed.world_size()}
        writer = GradientWriter(
            self.output_dir,
            identity,
            dim=self._projector.dim,
            dtype=self.config.dtype,
            extra={"library_version": __version__, "model": model_name(model)},
            rank=distributed.rank(),
        )
        if writer.complete and writer.num_rows and state.global_step == 0:
            writer.close()
            raise ValueError(
                f"output_dir={os.fspath(self.output_dir)!r} holds the {writer.num_rows} rows of a finished run; "
                "choose another folder, or resume the run by trainer.train(resume_from_checkpoint=True)"
            )
        dropped = writer.truncate("step", state.global_step) if writer.num_rows else 0
        if dropped:
            logger.warning(
                "%d rows of steps after %d, which training makes again, were dropped", dropped, state.global_step
            )
        return writer
