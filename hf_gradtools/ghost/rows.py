"""From the figures of a step to the rows of the dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core import distributed
from ..core.samples import SampleLayout
from .config import GhostDotProdConfig
from .engine import StepScores
from .sample_ids import BatchIds, locate_samples


logger = logging.getLogger(__name__)


@dataclass
class MicroBatchRecord:
    """What the forward of a micro-batch tells about its M samples.

    Attributes:
        ids: of the dataset rows in it.
        layout: how samples lie in it.
        num_targets: label entries of each sample that the loss counts, `[M]`, or None without labels.
        num_items_in_batch: what the model was told to divide the loss by.
        divides_by_items: whether it does: many models take the number and leave it. Trainer then scales nothing.
        is_fused: TRL's trainer divides by the targets of the whole step, and does not tell the model.
        loss: what the model returned.
        sample_losses: mean loss of each sample, `[M]`.
    """

    ids: BatchIds
    layout: SampleLayout
    num_targets: Tensor | None
    num_items_in_batch: Tensor | int | None
    divides_by_items: bool = True
    is_fused: bool = False
    loss: Tensor | None = None
    sample_losses: Tensor | None = None

    def normalizer(self, num_microbatches: int) -> float | None:
        """What the sum of token losses was divided by on its way into the step's gradient (mean over ranks)."""
        if self.num_items_in_batch is not None and self.divides_by_items:
            return float(self.num_items_in_batch)
        if self.num_targets is None:
            return None
        if self.num_items_in_batch is not None:
            return float(self.num_targets.sum())
        return float(self.num_targets.sum()) * num_microbatches * distributed.world_size()

    def mean_loss(self) -> float:
        """The micro-batch's mean loss over its own targets."""
        if self.loss is None:
            return float("nan")
        loss = float(self.loss)
        if self.num_items_in_batch is None or not self.divides_by_items or self.num_targets is None:
            return loss
        return loss * float(self.num_items_in_batch) / max(float(self.num_targets.sum()), 1.0)


def target_counts(inputs: Mapping[str, Any], layout: SampleLayout, shifts_labels: bool) -> Tensor | None:
    """Label entries that count in the loss, per sample: `[M]`, None without labels."""
    labels = _labels(inputs, shifts_labels)
    if labels is None or labels.shape[0] != layout.rows:
        return None
    counted = ((labels != -100) | torch.is_floating_point(labels)).to(torch.float64)
    return layout.sum_samples(counted[None])[0]


def sample_losses(
    output: Mapping[str, Any], inputs: Mapping[str, Any], layout: SampleLayout, shifts_labels: bool
) -> Tensor:
    """Mean loss of each sample over its own targets, `[M]`, from the outputs of a (sequence or token) classifier.

    Raises:
        ValueError: there are no labels, or neither logits nor log-probabilities to compare them with.
    """
    labels = _labels(inputs, shifts_labels)
    log_probs, logits = output.get("log_probs"), output.get("logits")
    if labels is None or labels.is_floating_point() or (log_probs is None and logits is None):
        raise ValueError(
            "sample_losses=True needs integer labels in the batch and logits in the model's output; set "
            "sample_losses=False for this model or trainer"
        )
    mask = labels != -100
    if log_probs is not None:
        losses = torch.nn.functional.pad(-log_probs.detach().double(), (0, labels.shape[1] - log_probs.shape[1]))
    else:
        rows = [  # in pieces, so that few logits are held in float32 at a time
            cross_entropy(row.float(), target.clamp_min(0), reduction="none")
            for row, target in zip(
                logits.detach().flatten(0, -2).split(1024), labels.flatten().split(1024), strict=True
            )
        ]
        losses = torch.cat(rows).double().view(labels.shape)
    sums = layout.sum_samples((losses * mask)[None])[0]
    return sums / layout.sum_samples(mask.double()[None])[0]


def build_rows(
    config: GhostDotProdConfig,
    records: Sequence[MicroBatchRecord],
    scores: StepScores,
    *,
    step: int,
    learning_rate: float,
    clip: float,
    second_order: Tensor | None,
    val_ids: Mapping[str, Sequence[Any]],
) -> tuple[dict[str, Any], int]:
    """Columns of the step's rows (without `epoch`), and how many samples were left out.

    Args:
        config: which columns.
        records: the step's micro-batches.
        scores: the engine's figures of the same samples.
        step: number of the optimizer step, from 1.
        learning_rate: of the step.
        clip: what clipping multiplied the gradient by, for optimizer-aware values.
        second_order: ⟨g_i, H Σg_j⟩, `[sets, M]`.
        val_ids: ids of the validation samples behind the gradient, by set.

    Raises:
        FloatingPointError: a sample's values are not finite and `on_nonfinite="error"`.
        ValueError: `scale="sample_mean"` without known normalisation.
    """
    columns = sample_columns(records)
    num_rows = len(columns["sample_id"])
    columns["step"] = np.full(num_rows, step, np.int64)
    columns["rank"] = np.full(num_rows, distributed.rank(), np.int32)
    columns["learning_rate"] = np.full(num_rows, learning_rate)
    columns["residual"] = np.full(num_rows, scores.residual, np.float32)
    factor = np.ones(num_rows) if config.scale == "contribution" else sample_mean_factor(records)
    names = list(val_ids)
    dots = _by_set(scores.dots.numpy(), val_ids, config.pairwise)
    layer_dots = _by_set(scores.layer_dots.numpy().transpose(1, 0, 2), val_ids, config.pairwise)
    for k, name in enumerate(names):
        suffix = "" if len(names) == 1 else f"/{name}"
        columns[f"dot_product{suffix}"] = (dots[k] * factor).astype(np.float32)
        value = -learning_rate * clip * dots[k]
        if second_order is not None:
            curvature = second_order[k].numpy() * clip
            columns[f"second_order{suffix}"] = (curvature * factor).astype(np.float32)
            value = value + learning_rate**2 / 2 * curvature
        columns[f"value{suffix}"] = (value * factor).astype(np.float32)
        if config.per_layer:
            columns[f"layer_dot_products{suffix}"] = (layer_dots[k] * factor).T.astype(np.float32)
        if config.grad_norms:
            assert scores.sq_norms is not None
            assert scores.target_norms is not None
            sizes = scores.sq_norms.sqrt().numpy() * scores.target_norms[k].item()
            with np.errstate(invalid="ignore", divide="ignore"):
                columns[f"cosine{suffix}"] = (dots[k] / sizes).astype(np.float32)
        if config.pairwise:
            start = sum(len(val_ids[n]) for n in names[:k])
            pairs = scores.dots.numpy()[start : start + len(val_ids[name])] * factor
            columns[f"pairwise_dot_products{suffix}"] = _lists(pairs.T.astype(np.float32))
            columns[f"val_sample_ids{suffix}"] = [list(val_ids[name])] * num_rows
        if config.per_token:
            tokens = [t.sum(0) if config.pairwise else t[k] for t in scores.token_dots]
            columns[f"token_dot_products{suffix}"] = _token_lists(tokens, records, factor)
    if config.grad_norms:
        assert scores.sq_norms is not None
        columns["grad_norm"] = (scores.sq_norms.sqrt().numpy() * factor).astype(np.float32)
    if config.sample_losses:
        losses = [r.sample_losses for r in records if r.sample_losses is not None]
        columns["sample_loss"] = torch.cat(losses).float().cpu().numpy()
    return _without_nonfinite(columns, scores, config, step)


def sample_columns(records: Sequence[MicroBatchRecord]) -> dict[str, Any]:
    """Who the samples of a step's micro-batches are, and what is known of them."""
    columns: dict[str, list[Any]] = {
        key: [] for key in ("sample_id", "sample_hash", "segment", "micro_step", "num_tokens", "train_loss")
    }
    for micro_step, record in enumerate(records):
        owners, segments = locate_samples(record.ids, record.layout)
        columns["sample_id"] += [record.ids.ids[row] for row in owners]
        columns["sample_hash"] += [record.ids.hashes[row] for row in owners]
        columns["segment"] += segments
        columns["micro_step"] += [micro_step] * len(owners)
        counts = [-1] * len(owners) if record.num_targets is None else record.num_targets.long().tolist()
        columns["num_tokens"] += counts
        columns["train_loss"] += [record.mean_loss()] * len(owners)
    types = {
        "sample_hash": np.uint64,
        "segment": np.int32,
        "micro_step": np.int32,
        "num_tokens": np.int64,
        "train_loss": np.float32,
    }
    return {key: np.asarray(value, types[key]) if key in types else value for key, value in columns.items()}


def sample_mean_factor(records: Sequence[MicroBatchRecord]) -> np.ndarray:
    """What turns a contribution to the step into the gradient of the sample's own mean loss."""
    of_step = _targets_of_step(records) if any(record.is_fused for record in records) else None
    factors = []
    for record in records:
        normalizer = record.normalizer(len(records)) if of_step is None else of_step
        if normalizer is None or record.num_targets is None:
            raise ValueError(
                "a sample's own mean loss needs to know how the batch's was averaged, but the batch reaches the model "
                "without labels (label smoothing, compute_loss_func): GhostDotProdCallback can take "
                "scale='contribution', GradProjCallback a dataset with loss_fn="
            )
        factors.append(normalizer / record.num_targets.cpu().numpy().clip(min=1))
    return np.concatenate(factors)


def _targets_of_step(records: Sequence[MicroBatchRecord]) -> float:
    """Targets of all micro-batches of all ranks."""
    counts = [record.num_targets.sum() for record in records if record.num_targets is not None]
    total = torch.stack(counts).sum()
    distributed.all_reduce_sum([total])
    return float(total)


def _by_set(values: np.ndarray, val_ids: Mapping[str, Sequence[Any]], pairwise: bool) -> np.ndarray:
    """Targets `[K, ...]` as validation sets `[sets, ...]`: the same, or the sum over each set's samples."""
    if not pairwise:
        return values
    stops = np.cumsum([len(ids) for ids in val_ids.values()])
    return np.stack([part.sum(0) for part in np.split(values, stops[:-1])])


def _lists(rows: np.ndarray) -> pa.Array:
    """`[M, n]` as a column of variable-length lists, since n may differ between steps."""
    return pa.ListArray.from_arrays(
        np.arange(0, rows.size + 1, max(rows.shape[1], 1), dtype=np.int32), rows.reshape(-1)
    )


def _token_lists(tokens: Sequence[Tensor], records: Sequence[MicroBatchRecord], factor: np.ndarray) -> list[Any]:
    lists: list[np.ndarray] = []
    for values, record in zip(tokens, records, strict=True):
        if record.layout.segments is None:
            lists += list(values.numpy())
        else:
            slots = record.layout.segments.cpu()
            lists += [values[slots == m].numpy() for m in range(record.layout.num_samples)]
    return [(row * f).astype(np.float32) for row, f in zip(lists, factor, strict=True)]


def _without_nonfinite(
    columns: dict[str, Any], scores: StepScores, config: GhostDotProdConfig, step: int
) -> tuple[dict[str, Any], int]:
    good = torch.isfinite(scores.dots).all(0).numpy()
    if good.all():
        return columns, 0
    bad_ids = [columns["sample_id"][i] for i in np.flatnonzero(~good)]
    shown = ", ".join(map(repr, bad_ids[:10])) + (" …" if len(bad_ids) > 10 else "")
    if not good.any():
        cause = "no sample has a finite value: the validation gradient or the weights are NaN or infinite"
    else:
        cause = f"the gradients of samples {shown} are not finite (NaN or infinite loss)"
    message = f"step {step}: {cause}"
    if config.on_nonfinite == "error":
        raise FloatingPointError(
            f"{message}. Look at these rows of the training data, lower the learning rate, or pass "
            "on_nonfinite='skip' to leave them out of the dataset."
        )
    logger.warning("%s; no rows are written for them", message)
    index = np.flatnonzero(good)
    taken = {
        key: values.take(pa.array(index))
        if isinstance(values, pa.Array)
        else [values[i] for i in index]
        if isinstance(values, list)
        else values[index]
        for key, values in columns.items()
    }
    return taken, int((~good).sum())


def _labels(inputs: Mapping[str, Any], shifts_labels: bool) -> Tensor | None:
    """Labels as seen from the positions that predict them: shifted ones are moved back by one."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    labels = inputs.get("labels")
    if labels is None or not shifts_labels or labels.ndim < 2:
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
