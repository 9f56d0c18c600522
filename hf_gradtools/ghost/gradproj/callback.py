"""`GradProjCallback`: projected gradients while `Trainer` trains, of its batches or of a dataset at chosen steps."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ... import __version__
from ...core import distributed
from ...core.store import read_manifest
from ..identity import frozen_fingerprint
from ..models import model_name
from ..resuming import take_up_rows
from ..sample_ids import bare_collator
from ..validation import LossFn, model_loss
from .batches import Collator, check_dataset
from .config import GradProjConfig
from .corpus import finish_all_ranks, holds_rows
from .ensemble import GradientEnsemble
from .projector import GradProjector
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
    callback = GradProjCallback({"train": rows, "target": few_rows}, output_dir="out/gradients", on_save=True)
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    callback.ensemble("train").search(callback.ensemble("target"), k=10)
    ```

    Args:
        dataset: rows, tokenized as those of training are, or several sets of them by name, each a store in
            `output_dir/step-N/<name>` whose gradients compare; None for the training batches.
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
        steps: int | Collection[int] | None = None,
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
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self.steps = None if steps is None else {int(steps)} if isinstance(steps, Integral) else set(steps)
        if self.steps is not None and (not self.steps or min(self.steps) < 1):
            raise ValueError(f"steps={steps!r} must be numbers of optimizer steps, from 1 on")
        self.datasets = named_datasets(dataset)
        self.output_dir, self.every_steps, self.on_checkpoints = Path(output_dir), every_steps, on_save
        self.data_collator, self.loss_fn = data_collator, loss_fn
        self.batch_size, self.sample_id_column = batch_size, sample_id_column
        self._projector: GradProjector | None = None
        self._training: TrainingProjections | None = None
        self._writer: GradientWriter | None = None
        self._pending: dict[str, Any] | None = None
        self._rate = 0.0

    # ---- results

    @property
    def store(self) -> GradientStore:
        """The rows of the training batches so far, also while training runs."""
        if self.datasets:
            raise ValueError("a dataset is projected here, not the training batches; its stores are in ensemble()")
        return GradientStore.open(self.output_dir)

    def ensemble(self, name: str | None = None, **options: Any) -> GradientEnsemble:
        """The stores of all chosen steps, weighed by their learning rates; see [`GradientEnsemble`].

        Args:
            name: of the dataset, where there are several.
            **options: of the ensemble, such as `weights`.

        Raises:
            ValueError: there is no such dataset, or no step has been projected.
        """
        if (name or "") not in self.datasets:
            raise ValueError(f"name={name!r} is no dataset of this callback; it has {list(self.datasets)}")
        stores = [GradientStore.open(folder / (name or "")) for folder in self._step_folders()]
        if unfinished := [str(store.path) for store in stores if not store.complete]:
            raise ValueError(
                f"{', '.join(unfinished)}: not all rows are there yet. Resume the run, which finishes its last step, "
                "or delete the folders of such steps."
            )
        return GradientEnsemble(stores, **options)

    def _step_folders(self) -> list[Path]:
        return sorted(self.output_dir.glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))

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
        if self.datasets and state.global_step == 0 and self._step_folders():
            raise ValueError(
                f"output_dir={os.fspath(self.output_dir)!r} holds {self._step_folders()[0].name} of an earlier run; "
                "choose another folder, or resume the run by trainer.train(resume_from_checkpoint=True)"
            )
        with self._closing_on_error():
            collator = self.data_collator or bare_collator(loader.collate_fn)
            self._projector = GradProjector(model, data_collator=collator, loss_fn=self.loss_fn, config=self.config)
            self._optimizer = kwargs["optimizer"]
            if self.datasets and state.global_step:
                self._resume_datasets(state)
            if not self.datasets:
                if holds_rows(self.output_dir):  # a run that goes on, from other weights
                    self._projector.adopt(self.output_dir, any_weights=True)
                self._training = TrainingProjections(
                    self._projector, self._optimizer, dataloader, self.sample_id_column, self.close
                )
                self._writer = self._open_writer(model, state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._pending = None
        self._rate = self._learning_rate()  # the scheduler moves on before the step ends
        if self._training is not None:
            self._training.begin_step(self._is_chosen(state.global_step + 1))

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._training is None or not self._training.active:
            return
        with self._closing_on_error():
            self._pending = self._training.columns()
            rows = len(self._pending["sample_id"])
            self._pending["step"] = [state.global_step + 1] * rows
            self._pending["learning_rate"] = [self._rate] * rows

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
        if self.datasets and not self.on_checkpoints and self._is_chosen(state.global_step):
            self._project_datasets(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.datasets and self.on_checkpoints:
            self._project_datasets(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if missed := sorted(step for step in self.steps or () if step > state.global_step):
            logger.warning("training ended at step %d, before steps=%s", state.global_step, missed)
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
        return step in self.steps if self.steps else step % (self.every_steps or 1) == 0

    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _resume_datasets(self, state: TrainerState) -> None:
        """Drops the steps that training makes again, and finishes the one that a kill has interrupted after its
        checkpoint was written."""
        folders = {int(folder.name.split("-")[1]): folder for folder in self._step_folders()}
        if distributed.rank() == 0:
            for step, folder in folders.items():
                if step > state.global_step:
                    logger.warning("%s is of a step that training makes again; it is dropped", folder)
                    shutil.rmtree(folder)
        distributed.barrier()
        self._rate = self._learning_rate()
        if self.on_checkpoints or state.global_step in folders:
            for manifest in sorted(self.output_dir.glob(f"step-{state.global_step}/**/manifest.json")):
                self._rate = float(read_manifest(manifest.parent)["extra"].get("learning_rate", self._rate))
            self._project_datasets(state)

    def _project_datasets(self, state: TrainerState) -> None:
        assert self._projector is not None
        extra = {"step": state.global_step, "learning_rate": self._rate}
        with self._closing_on_error():
            for name, rows in self.datasets.items():
                folder = self.output_dir / f"step-{state.global_step}" / name
                self._projector.project(rows, output_dir=folder, batch_size=self.batch_size, extra=extra)

    def _open_writer(self, model: nn.Module, state: TrainerState) -> GradientWriter:
        assert self._projector is not None
        # Trainable weights are not part of it: each step has its own, and a resumed run starts from later ones.
        frozen = {"training_batches": True, "frozen_weights": frozen_fingerprint(model)}
        dataset = {**frozen, "world_size": distributed.world_size()}
        identity = {**self._projector.identity(), "weights": "those of each step", "dataset": dataset}
        writer = GradientWriter(
            self.output_dir,
            identity,
            dim=self._projector.dim,
            dtype=self.config.dtype,
            extra={"library_version": __version__, "model": model_name(model)},
            rank=distributed.rank(),
        )
        if not writer.num_rows:
            self._projector.save_fit(self.output_dir)
        take_up_rows(writer, self.output_dir, state.global_step)
        return writer


def named_datasets(dataset: Any) -> dict[str, Any]:
    """Datasets by name, a single one by the empty name; none for None.

    Raises:
        ValueError: one has no rows or no length.
    """
    if dataset is None:
        return {}
    datasets = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    if not datasets:
        raise ValueError("dataset is an empty mapping; pass rows, or several sets of them by name")
    for name, rows in datasets.items():
        if isinstance(dataset, Mapping) and (not isinstance(name, str) or not name or "/" in name):
            raise ValueError(f"dataset has a set named {name!r}; names become folders: pass plain words")
        check_dataset(rows)
    return datasets
