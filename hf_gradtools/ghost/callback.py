"""`GhostDotProdCallback`: which training samples help or hurt a validation set, told while `Trainer` trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import __version__
from ..core import distributed
from ..core.quantized import keep_quantized_gradients
from ..core.samples import SampleLayout
from ..core.store import RowStore
from .config import GhostDotProdConfig
from .engine import GhostDotProd, StepScores
from .identity import run_identity
from .layout import infer_layout
from .loading import load_ghost_dataset
from .models import base_model, divides_by_items, shifts_labels
from .optimizers import exact_derivative, frozen_derivative, learning_rates, unwrap_optimizer
from .results import GhostValues, ghost_values
from .resuming import take_up_rows
from .rows import MicroBatchRecord, build_rows, sample_losses, target_counts
from .sample_ids import BatchIds, install_ids
from .validation import count_targets, evaluating, model_loss
from .validation_data import ValidationData


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


logger = logging.getLogger(__name__)


class GhostDotProdCallback(TrainerCallback):
    """Scores every training sample of every step by the dot product of its gradient with a validation gradient.

    Works in `Trainer`, `Seq2SeqTrainer` and TRL's `SFTTrainer`, with accumulation, clipping, mixed precision,
    checkpointing, PEFT adapters on plain or quantised bases, packing and data parallelism. Loss, data order, random
    state, optimizer and checkpoints stay as they are.

    ```python
    callback = GhostDotProdCallback(val_dataset=ds["validation"], output_dir="out/ghost")
    Trainer(model, args, train_dataset=ds["train"], callbacks=[callback]).train()
    callback.values().most_harmful(10)
    ```

    Args:
        val_dataset: rows prepared as the training rows are (they are collated alike), or several such datasets by
            name, each giving columns of its own. None takes the trainer's `eval_dataset`, see :meth:`set_trainer`.
        data_collator: makes a batch of validation rows; default the trainer's.
        loss_fn: `loss_fn(model, batch)`, the mean validation loss; default `model(**batch).loss`.
        config: the options, or give them by name:
        **options: fields of :class:`GhostDotProdConfig`.

    Raises:
        ValueError: the validation set is empty, an option is out of range.

    Source: Wang et al., "Data Shapley in One Training Run", ICLR 2025, arXiv 2406.11011, §4.
    """

    def __init__(
        self,
        val_dataset: Any = None,
        *,
        data_collator: Callable[[list[Any]], Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] = model_loss,
        config: GhostDotProdConfig | None = None,
        **options: Any,
    ):
        if config is not None and options:
            raise ValueError(f"give either config= or {', '.join(options)}, not both")
        self.config = config or GhostDotProdConfig(**options)
        self.val_dataset = val_dataset
        self.data_collator = data_collator
        self.loss_fn = loss_fn
        self.figures: dict[str, float] = {}
        if val_dataset is not None:
            ValidationData.check_not_empty(val_dataset)
        self._trainer: Trainer | None = None
        self._key = f"__ghost_{id(self)}__"
        self._undo: list[Callable[[], Any]] = []
        self._engine: GhostDotProd | None = None
        self._store: RowStore | None = None
        self._records: list[MicroBatchRecord] = []
        self._pending: dict[str, Any] | None = None
        self._scoring = False

    # ---- results

    @property
    def dataset(self) -> Dataset:
        """The rows written so far, also while training runs."""
        return load_ghost_dataset(self.config.output_dir)

    def values(self, val: str | None = None) -> GhostValues:
        """In-run values per sample, see :func:`ghost_values`."""
        return ghost_values(self.dataset, val)

    def set_trainer(self, trainer: Trainer) -> None:
        """Lets the callback log its figures through `trainer.log` (so that `report_to` gets them) and, without a
        `val_dataset`, use the trainer's `eval_dataset`."""
        self._trainer = trainer

    # ---- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()  # of a run that was interrupted
        model, dataloader = kwargs["model"], kwargs["train_dataloader"]
        if args.n_gpu > 1:
            raise ValueError(
                "GhostDotProdCallback does not run under nn.DataParallel; start one process per GPU with "
                "`accelerate launch` or `torchrun`"
            )
        if args.deepspeed:
            raise ValueError(
                "GhostDotProdCallback needs whole parameters and DeepSpeed partitions them; train without deepspeed="
            )
        with self._closing_on_error():
            self._begin(args, state, model, kwargs["optimizer"], dataloader)

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any, dataloader: Any
    ) -> None:
        config = self.config
        shifts = shifts_labels(model)
        self._optimizer, self._args = optimizer, args
        if config.optimizer_aware:
            unwrap_optimizer(optimizer)
            if optimizer.scaler is not None:
                raise ValueError(
                    "optimizer_aware values are not defined under fp16 loss scaling; train with bf16=True"
                )
        self._engine = engine = GhostDotProd(
            model,
            layers=config.layers,
            method=config.method,
            per_token=config.per_token,
            grad_norms=config.grad_norms,
            retain=config.second_order or config.optimizer_aware == "exact",
            keep_grads=config.second_order,
            loss_fn=self.loss_fn,
            shifts_labels=shifts,
            on_uncovered=config.on_uncovered,
            starts_itself=False,
        )
        engine.on_failure = self.close
        engine.is_last_microbatch = lambda: optimizer.gradient_state.sync_gradients
        engine.loss_scale = lambda: 1.0 if optimizer.scaler is None else optimizer.scaler.get_scale()
        self._validation = ValidationData(
            self._validation_dataset(), dataloader, self.data_collator, config, args.device, self.loss_fn is model_loss
        )
        self._store = self._open_store(model, args, state, dataloader)
        self._undo.append(keep_quantized_gradients(model))
        self._undo.append(install_ids(dataloader, self._key, config.sample_id_column))
        hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]
        self._undo += [hook.remove for hook in hooks]
        engine.attach()
        self._undo.append(engine.detach)
        self._shifts_labels = shifts
        self._divides_by_items: bool | None = None  # not known yet

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._records, self._pending = [], None
        self._scoring = state.global_step % self.config.every_steps == 0
        if not self._scoring or self._engine is None:
            return
        with self._closing_on_error():
            self._batches = self._validation.batches(state.global_step)
            if self._divides_by_items is None:
                self._divides_by_items = self._probe_normalizer(kwargs["model"])
            scale = self._update_scale() if self.config.optimizer_aware is True else None
            chunks = {name: chunks for name, (chunks, _) in self._batches.items()}
            self._engine.validate(chunks, scale, separately=self.config.pairwise)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._scoring and self._engine is not None:
            with self._closing_on_error():
                self._score(state)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._pending is not None and self._optimizer.step_was_skipped:
            logger.info("step %d was skipped by the loss scaler; its samples get no rows", state.global_step + 1)
            self._pending = None

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._pending is not None and self._store is not None:
            self._pending["epoch"] = [float(state.epoch or 0.0)] * len(self._pending["step"])
            self._store.append(self._pending)
            self._pending = None
        if control.should_log and self.figures and self._trainer is not None:
            self._trainer.log(dict(self.figures))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self._trainer is None:
            logs.update(self.figures)  # seen by the progress bar; reporters need set_trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._store is not None:
            self._store.seal()
            distributed.barrier()
            self._store.finish()
            distributed.barrier()
        self.close()

    def close(self) -> None:
        """Takes every hook off the model and the dataloader. Training that ends or fails here does it by itself;
        call it after interrupting `trainer.train()` by Ctrl-C."""
        while self._undo:
            self._undo.pop()()
        if self._store is not None:
            self._store.close()
        self._engine, self._store, self._scoring = None, None, False

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """An exception ends training without another event: the model must be clean by then."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    # ---- a forward pass

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs.pop(self._key, None)
        if self._scoring and module.training and torch.is_grad_enabled():
            with self._closing_on_error():
                self._begin_microbatch(ids, infer_layout(args, kwargs), kwargs)
        return args, kwargs

    def _begin_microbatch(self, ids: BatchIds | None, layout: SampleLayout, kwargs: Mapping[str, Any]) -> None:
        assert self._engine is not None
        if ids is None:
            raise RuntimeError(
                "a training batch reached the model without its sample ids: the trainer's training_step or "
                f"compute_loss drops unknown inputs such as {self._key!r}. Pass all of `inputs` to the model."
            )
        counts = target_counts(kwargs, layout, self._shifts_labels)
        items = kwargs.get("num_items_in_batch")
        divides, fused = self._divides_by_items is not False, bool(kwargs.get("fused_lm_head"))
        self._records.append(MicroBatchRecord(ids, layout, counts, items, divides, fused))
        self._engine.begin_microbatch(layout)

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        trains = self._scoring and module.training and torch.is_grad_enabled()
        if not trains or not isinstance(output, Mapping):
            return
        record = self._records[-1]
        if output.get("loss") is not None:
            record.loss = output["loss"].detach()
        if self.config.sample_losses:
            with self._closing_on_error(), torch.no_grad():
                record.sample_losses = sample_losses(output, kwargs, record.layout, self._shifts_labels)

    def _probe_normalizer(self, model: nn.Module) -> bool:
        """Whether the model's loss is divided by `num_items_in_batch`, tried on the first validation batch."""
        (batch, *_), _ = next(iter(self._batches.values()))
        if self.loss_fn is not model_loss or not count_targets(batch, self._shifts_labels):
            return True
        with evaluating(model):
            return divides_by_items(model, batch)

    # ---- a step

    def _score(self, state: TrainerState) -> None:
        engine, config = self._engine, self.config
        assert engine is not None
        scores = engine.scores()
        if self._optimizer.scaler is not None and not torch.isfinite(scores.dots).all():
            return  # the scaler will skip the step and lower its scale
        clip = engine.clip_coefficient() if config.optimizer_aware else 1.0
        second_order = None
        if config.optimizer_aware == "exact":
            scores = self._rescore_exactly(scores)
        if config.second_order:
            second_order = self._second_order(clip)
        engine.release()
        rows, left_out = build_rows(
            config,
            self._records,
            scores,
            step=state.global_step + 1,
            learning_rate=self._reference_lr(),
            clip=clip,
            second_order=second_order,
            val_ids={name: ids for name, (_, ids) in self._batches.items()},
        )
        self._pending = rows
        self.figures = {
            "ghost/residual": scores.residual,
            "ghost/dot_product_mean": float(scores.dots.mean()),
            "ghost/harmful_share": float((scores.dots.sum(0) < 0).double().mean()),
            "ghost/rows_left_out": float(left_out),
        }

    def _update_scale(self) -> Callable[[nn.Parameter], Tensor | float]:
        """Factor on the validation gradient that makes dot products optimizer-aware."""
        optimizer = unwrap_optimizer(self._optimizer)
        rates, reference = learning_rates(optimizer), self._reference_lr()
        return lambda p: frozen_derivative(optimizer, p) * (rates[p] / reference if reference else 1.0)

    def _rescore_exactly(self, scores: StepScores) -> StepScores:
        engine = self._engine
        assert engine is not None
        optimizer = unwrap_optimizer(self._optimizer)
        rates, reference = learning_rates(optimizer), self._reference_lr()
        targets = []
        for k in range(len(scores.dots)):
            target = {}
            for p in engine.parameters:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                factor = exact_derivative(optimizer, p, grad) * (rates[p] / reference if reference else 1.0)
                target[p] = engine.target(p)[k] * factor
            targets.append(target)
        return engine.rescored(scores, targets)

    def _second_order(self, clip: float) -> Tensor:
        """⟨P g_i, H P Σ_j g_j⟩ for every validation set, `[K, M]`; P is 1 unless optimizer-aware."""
        engine = self._engine
        assert engine is not None
        scale = self._update_scale() if self.config.optimizer_aware else lambda p: 1.0
        gradient = engine.batch_gradient()
        vector = [gradient[p] * scale(p) * clip for p in engine.parameters]
        values = []
        for chunks, _ in self._batches.values():
            product = engine.hessian_product(chunks, vector)
            values.append(
                engine.rescore({p: h * scale(p) for p, h in zip(engine.parameters, product, strict=True)}).sum(0)
            )
        return torch.stack(values)

    def _reference_lr(self) -> float:
        """The learning rate of the first scored parameter, which `value` is computed with."""
        assert self._engine is not None
        rates = {p: float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}
        scored = {rates[p] for p in self._engine.parameters if p in rates}
        if not scored:
            raise ValueError("none of the scored parameters is in the optimizer; check layers=[...]")
        if len(scored) > 1 and not self.config.optimizer_aware:
            _warn_once(
                "the scored parameters have several learning rates; `value` uses the first one for all. "
                "optimizer_aware=True weighs each by its own."
            )
        return next(rates[p] for p in self._engine.parameters if p in rates)

    # ---- data and store

    def _validation_dataset(self) -> Any:
        if self.val_dataset is not None:
            return self.val_dataset
        if self._trainer is None or self._trainer.eval_dataset is None:
            raise ValueError(
                "GhostDotProdCallback has no val_dataset; pass val_dataset=ds['validation'], or give the trainer an "
                "eval_dataset and call callback.set_trainer(trainer)"
            )
        ValidationData.check_not_empty(self._trainer.eval_dataset)
        return self._trainer.eval_dataset

    def _open_store(self, model: nn.Module, args: TrainingArguments, state: TrainerState, dataloader: Any) -> RowStore:
        config = self.config
        assert self._engine is not None
        identity = run_identity(base_model(model), self._engine.layers, self._validation.sizes(), config)
        extra = {
            "library_version": __version__,
            "train_rows": _length(dataloader),
            "train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "optimizer": type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__,
        }
        store = RowStore(
            config.output_dir,
            identity,
            extra=extra,
            rank=distributed.rank(),
            rows_per_shard=config.rows_per_shard,
        )
        take_up_rows(store, config.output_dir, state.global_step, overwrite=config.overwrite_output_dir)
        return store


def _length(dataloader: Any) -> int | None:
    dataset = getattr(dataloader, "base_dataloader", dataloader).dataset
    return len(dataset) if hasattr(dataset, "__len__") else None


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
