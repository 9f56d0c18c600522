"""Projects the gradients of training batches while `Trainer` runs them backward."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ...core import distributed
from ...core.capture import LayerCapture
from ...core.quantized import keep_quantized_gradients
from ..coverage import refuse_batch_statistics
from ..fused_head import fused_head_layer, install_fused_tap
from ..layout import infer_layout
from ..models import divides_by_items, shifts_labels
from ..rows import MicroBatchRecord, sample_columns, sample_mean_factor, target_counts
from ..sample_ids import bare_collator, bare_dataset, install_ids
from ..validation import evaluating
from .collector import ProjectionCollector
from .projector import GradProjector


logger = logging.getLogger(__name__)


class TrainingProjections:
    """Hooks on a model and its dataloader that collect, of each training micro-batch, projected gradients and ids.

    Args:
        projector: of the model that trains.
        optimizer: accelerate's, for the loss scale of fp16.
        dataloader: serves the training batches.
        id_column: of the dataset rows, if there is one.
        on_failure: called before an exception leaves through `backward()`.
    """

    def __init__(
        self,
        projector: GradProjector,
        optimizer: Any,
        dataloader: Any,
        id_column: str,
        on_failure: Callable[[], None],
    ):
        self.projector, self.model, self.optimizer = projector, projector.model, optimizer
        refuse_batch_statistics(projector.layers)
        self.active = False
        self._shifts_labels = shifts_labels(self.model)
        loader = getattr(dataloader, "base_dataloader", dataloader)
        self._divides_by_items: bool | None = None  # not known before a batch with labels
        self._probing = False
        if not isinstance(loader.dataset, IterableDataset):
            projector.prepare(bare_dataset(loader.dataset), bare_collator(loader.collate_fn), loader.batch_size or 8)
        elif not projector.is_ready:
            raise ValueError(
                "ranks or bases that are fitted need samples to fit on, and the training dataset is iterable; pass "
                "rank=64 and basis='orthonormal', or call projector.fit(rows) on a dataset first"
            )
        self._records: list[MicroBatchRecord] = []
        self._rows: list[Tensor] = []
        self._key = f"__gradproj_{id(self)}__"
        self._undo: list[Callable[[], Any]] = []
        self._attach(dataloader, id_column, on_failure)

    def _attach(self, dataloader: Any, id_column: str, on_failure: Callable[[], None]) -> None:
        layers = self.projector.layers
        # TRL's trainers never call the output head; they can only be in use once trl has been imported.
        fused = fused_head_layer(self.model, layers) if "trl" in sys.modules else None
        seen = layers if fused is None else [*layers, fused]
        self._collector = ProjectionCollector(seen, self.projector.projection, on_failure)
        self._undo.append(keep_quantized_gradients(self.model))
        self._undo.append(install_ids(dataloader, self._key, id_column))
        self._undo.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        capture = LayerCapture(layers, self._collector)
        capture.attach()
        self._undo.append(capture.detach)
        if fused is not None:
            self._undo.append(install_fused_tap(self.model, fused, self._collector).remove)
        self._undo.append(
            self.model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True).remove
        )

    def close(self) -> None:
        """Takes every hook off the model and the dataloader."""
        while self._undo:
            self._undo.pop()()

    # ---- a step

    def begin_step(self, active: bool) -> None:
        """Forgets what the last step left; with `active` the coming micro-batches are collected."""
        self.active = active
        self._records, self._rows = [], []
        self._collector.drop()

    def columns(self) -> dict[str, Any]:
        """The step's samples, with the projected gradient of each one's own loss. Call it before the optimizer steps.

        Raises:
            RuntimeError: no micro-batch passed.
        """
        self._end_microbatch()
        if not self._records:
            raise RuntimeError("no training batch reached the model in this step")
        self.active = False
        columns = sample_columns(self._records)
        gradients = torch.cat(self._rows)
        scaler = self.optimizer.scaler
        share = 1 / (distributed.world_size() * (1.0 if scaler is None else scaler.get_scale()))
        factor = sample_mean_factor(self._records)
        if self.projector.config.loss_reduction == "sum":
            factor = factor * columns["num_tokens"].clip(min=1)
        columns["gradient"] = gradients * torch.from_numpy(np.asarray(factor * share)).to(gradients)[:, None]
        return self._finite(columns)

    def _finite(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The rows whose gradients are finite, if others are to be skipped; the store refuses these."""
        good = torch.isfinite(columns["gradient"]).all(1)
        if bool(good.all()) or self.projector.config.on_nonfinite == "error":
            return columns
        kept = good.nonzero().flatten().tolist()
        bad = [columns["sample_id"][i] for i in (~good).nonzero().flatten().tolist()]
        logger.warning("the gradients of samples %s are not finite; they get no rows", bad)
        return {
            name: [values[i] for i in kept] if isinstance(values, list) else values[kept]
            for name, values in columns.items()
        }

    def _end_microbatch(self) -> None:
        if len(self._rows) < len(self._records):
            self._rows.append(self._collector.take().cpu())

    # ---- hooks of the model

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._probing:
            return args, kwargs
        ids = kwargs.pop(self._key, None)
        trains = module.training and torch.is_grad_enabled()
        # An evaluation between forward and backward (TRL makes one for its metrics) is not part of the step.
        self._collector.suspended = not trains
        if not (self.active and trains):
            return args, kwargs
        if ids is None:
            raise RuntimeError(
                "a training batch reached the model without its sample ids: the trainer's training_step or "
                f"compute_loss drops unknown inputs such as {self._key!r}. Pass all of `inputs` to the model."
            )
        self._end_microbatch()
        layout = infer_layout(args, kwargs)
        counts = target_counts(kwargs, layout, self._shifts_labels)
        if counts is None and kwargs.get("start_positions") is not None:
            counts = torch.ones(layout.num_samples, dtype=torch.float64)  # a span is one target
        items = kwargs.get("num_items_in_batch")
        if self._divides_by_items is None and items is not None and counts is not None and counts.sum() > 0:
            self._divides_by_items = self._probe_normalizer(kwargs)
        divides = self._divides_by_items is not False
        fused = bool(kwargs.get("fused_lm_head"))
        self._records.append(MicroBatchRecord(ids, layout, counts, items, divides, fused))
        self._collector.begin(layout, self.projector.device, self.projector.rows_dtype)
        return args, kwargs

    def _probe_normalizer(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the model's loss is divided by `num_items_in_batch`, tried on a batch."""
        self._probing = True
        try:
            with evaluating(self.model):
                batch = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
                return divides_by_items(self.model, batch)
        finally:
            self._probing = False

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if self._probing:
            return
        self._collector.suspended = False
        trains = self.active and module.training and torch.is_grad_enabled()
        if trains and isinstance(output, Mapping) and output.get("loss") is not None:
            self._records[-1].loss = output["loss"].detach()
