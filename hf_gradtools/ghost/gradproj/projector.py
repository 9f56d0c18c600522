"""`GradProjector`: low-dimensional projections of every sample's gradient at fixed weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import __version__
from ...core import distributed
from ...core.projection import Bases, Block, Projection
from ...core.shards import as_json, differences
from ...core.store import StoreMismatchError, read_manifest
from ..identity import weights_fingerprint
from ..models import load_any_model, model_name
from ..validation import LossFn, model_loss
from .batches import (
    BatchMaker,
    Collator,
    batch_fingerprint,
    check_dataset,
    dataset_fingerprint,
    plan_windows,
    row_lengths,
    share_of_rank,
)
from .blocks import Tokens, block_shapes, find_blocks, parameter_names, principal_bases, random_bases
from .check import batch_to_check, check_coverage, check_rows
from .chosen import choose_layers
from .collector import ProjectionCollector
from .config import GradProjConfig
from .corpus import holds_rows, write_rows
from .fitting import FitCollector, bases_digest, load_bases, save_bases
from .passes import GradientPass
from .randomness import repeatable
from .store import GradientStore, GradientWriter


logger = logging.getLogger(__name__)

WINDOW_ROWS = 256
RANKS = "ranks"  # in the identity: of each block


class GradProjector:
    """Projects the gradient of every sample of a dataset, one forward and one backward pass per batch.

    Only output gradients are propagated: the weights need no gradient and none is formed, so a pass costs less than
    a training step.

    ```python
    projector = GradProjector(model, proj_rank_total=1024)
    store = projector.project(tokenized, output_dir="out/gradients", batch_size=16)
    store.search(queries, k=10)
    ```

    Args:
        model: any module that returns a loss, or Hub id or folder of a model or adapter. Gradients are taken in its
            trainable parameters; where there are none, in the adapters of a PEFT model, or else in all weights.
        data_collator: makes batches of rows; by default they are padded on the right.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch; default `model(**batch)["loss"]`.
        optimizer_state: for `precondition="adam"`: a torch Adam or AdamW that trains the model, or the folder of a
            Trainer checkpoint with `optimizer.pt`.
        config: the options, or give them by name:
        **options: fields of :class:`GradProjConfig`.

    Raises:
        ValueError: an option is out of range, a pattern of `layers` matches nothing, the model cannot be loaded.

    Source: Choe et al., LoGra, arXiv 2405.13954, §3.1; Park et al., TRAK, arXiv 2303.14186, §3.2.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        *,
        data_collator: Collator | None = None,
        loss_fn: LossFn = model_loss,
        optimizer_state: torch.optim.Optimizer | str | os.PathLike[str] | None = None,
        config: GradProjConfig | None = None,
        **options: Any,
    ):
        if config is not None and options:
            raise ValueError(f"give either config= or {', '.join(options)}, not both")
        self.config = config or GradProjConfig(**options)
        self.model: nn.Module = model if isinstance(model, nn.Module) else load_any_model(model)
        self.data_collator, self.optimizer_state = data_collator, optimizer_state
        self.layers = choose_layers(self.model, self.config.layers)
        self._pass = GradientPass(self.model, self.layers, loss_fn, self.config.loss_reduction)
        self._projection: Projection | None = None
        if not self.config.is_fitted:
            self._install(find_blocks(self.layers, self.config, {}))
        self._is_checked = self.config.on_uncovered == "ignore"

    @property
    def projection(self) -> Projection:
        """The map from gradients to numbers.

        Raises:
            RuntimeError: it depends on samples and none were seen yet.
        """
        if self._projection is None:
            raise RuntimeError("the projection is not fitted yet: call projector.fit(dataset) or project(dataset)")
        return self._projection

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self._pass.device

    @property
    def rows_dtype(self) -> torch.dtype:
        """In which gradients are summed."""
        return self._pass.dtype

    @property
    def dim(self) -> int:
        """Numbers per sample."""
        return self.config.sketch_dim or self.projection.dim

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on: model, layers, options. Rows of another identity do not compare."""
        weight = next(iter(self.layers[0].parameters.values()))
        blocks = self._projection.blocks.values() if self._projection else ()
        fits_bases = self.config.basis == "pca" and self._projection is not None
        return {
            "model_class": type(self.model).__name__,
            "weights": weights_fingerprint(self.model),
            "model_dtype": str(weight.dtype).removeprefix("torch."),
            "layers": [layer.name for layer in self.layers],
            **self.config.identity(),
            RANKS: {block.name: list(block.ranks) for block in blocks},
            "bases": bases_digest(self.projection.bases) if fits_bases else None,
        }

    # ---- what it is for

    def project(
        self,
        dataset: Any,
        collator: Collator | None = None,
        output_dir: str | os.PathLike[str] = "gradients",
        batch_size: int = 8,
        *,
        extra: Mapping[str, Any] | None = None,
        window_rows: int = WINDOW_ROWS,
    ) -> GradientStore:
        """Writes one row per sample, in the dataset's order, and returns the store, ready to be searched.

        A run that was killed goes on where it stopped when called again. Under several processes each takes a part.

        Args:
            dataset: tokenized rows, with labels; their ids are its column `sample_id`, or their numbers.
            collator: in the place of `data_collator`.
            output_dir: folder of the store.
            batch_size: rows of a forward pass; those of like length among `window_rows` share one.
            extra: JSON values to record with the rows, such as `{"learning_rate": 1e-4}`.
            window_rows: rows that reach the disk together: what a kill can lose.

        Raises:
            ValueError: the dataset is empty, has no labels, or a size is out of range.
            StoreMismatchError: the folder holds gradients of another model, other options or another dataset.
            UncoveredGradientError: gradients are missing in the projections, see `on_uncovered`.
        """
        for name, value in (("batch_size", batch_size), ("window_rows", window_rows)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_dataset(dataset)
        self.data_collator = collator or self.data_collator
        with repeatable(self.config.seed):
            if holds_rows(output_dir):
                self.adopt(output_dir)
            self._prepare(dataset, batch_size)
            windows = plan_windows(row_lengths(dataset), window_rows, batch_size)
            with self._writer(dataset, output_dir, extra, window_rows) as writer:
                if not writer.complete:
                    mine = share_of_rank(windows, distributed.rank(), distributed.world_size())
                    batches = self._batches()
                    with self._pass.observed(self._collector(self.projection, False)) as collector:
                        write_rows(self._pass, collector, batches, dataset, mine, writer, self.config)
        return GradientStore.open(output_dir).bind(self)

    def gradients(self, rows: Any, optimizer_aware: bool = False, batch_size: int = 8) -> Tensor:
        """The projected gradients of a few rows, such as queries: `[Q, dim]` on the CPU.

        Args:
            rows: as of :meth:`project`, or a list of them.
            optimizer_aware: of Adam's step along the gradient instead of the gradient, see `optimizer_state`.
            batch_size: rows of a forward pass.

        Raises:
            ValueError: a row has no label that counts, or there is no optimizer state.
        """
        check_dataset(rows)
        with repeatable(self.config.seed):
            self._prepare(rows, batch_size)
            return self._gradients(rows, self.projection, optimizer_aware, batch_size)

    def layer_dots(self, queries: Any, rows: Any, batch_size: int = 8) -> dict[str, Tensor]:
        """By layer, the inner products of the gradients of queries and rows: `[Q, R]` each.

        They are estimated from the first stage, before the sketch adds the layers up.
        """
        with repeatable(self.config.seed):
            self._prepare(queries, batch_size)
            blocks = list(self.projection.blocks.values())
            stage_one = Projection(blocks, self.projection.bases, None, self.config.seed)
            ours, theirs = (self._gradients(x, stage_one, False, batch_size) for x in (queries, rows))
        names, dots = parameter_names(self.layers), dict[str, Tensor]()
        for layer in self.layers:
            for parameter in layer.parameters.values():
                part = stage_one.slices.pop(names[parameter], None)
                if part is not None:  # a tied parameter counts with its first layer
                    dots[layer.name] = ours[:, part] @ theirs[:, part].T + dots.get(layer.name, 0.0)
        return dots

    def fit(self, dataset: Any, batch_size: int = 8) -> None:
        """Fits what depends on samples ("auto" ranks, "pca" bases) on `fit_samples` rows of a dataset, evenly spaced.

        :meth:`project` does it when it has to.
        """
        check_dataset(dataset)
        with repeatable(self.config.seed):
            self._fit(dataset, batch_size)

    def _fit(self, dataset: Any, batch_size: int) -> None:
        count = min(self.config.fit_samples, len(dataset))
        chosen = [len(dataset) * i // count for i in range(count)]
        batches, norms = self._batches(), []
        with self._pass.observed(FitCollector(self.layers, self.config.basis == "pca")) as collector:
            for start in range(0, count, batch_size):
                batch = batches(dataset, chosen[start : start + batch_size])
                norms.append(self._pass.project(collector, batch)[0])
        blocks = find_blocks(self.layers, self.config, collector.energies(torch.cat(norms)))
        self._install(blocks, tokens=collector.tokens())

    def prepare(self, dataset: Any, collator: Collator | None = None, batch_size: int = 8) -> None:
        """Fits what depends on samples, unless that is done, and checks gradients of some rows."""
        self.data_collator = collator or self.data_collator
        with repeatable(self.config.seed):
            self._prepare(dataset, batch_size)

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to be fitted."""
        return self._projection is not None

    def adopt(self, store: str | os.PathLike[str], any_weights: bool = False) -> None:
        """Takes the fit of a store, so that what is projected next compares with its rows, unless something was
        fitted before.

        Args:
            store: its folder.
            any_weights: also if its gradients are of other weights, as after some more training.

        Raises:
            StoreMismatchError: it is of another model or other options.
        """
        if self._projection is not None:
            return
        stored, mine = read_manifest(store)["identity"], as_json(self.identity())
        compared = set(mine) - {RANKS, "bases"} - ({"weights"} if any_weights else set())
        if differing := differences({key: stored.get(key) for key in compared}, {key: mine[key] for key in compared}):
            raise StoreMismatchError(
                f"the store {os.fspath(store)} was made with other settings: {differing}. Pass another folder, or the "
                "model and options it was made with."
            )
        blocks = [Block(name, shape, tuple(stored[RANKS][name])) for name, shape in block_shapes(self.layers).items()]
        self._install(blocks, bases=load_bases(store, self._pass.device))

    def save_fit(self, folder: str | os.PathLike[str]) -> None:
        """Writes what no seed brings back beside rows that are going to be made with it."""
        if self.config.basis == "pca" and distributed.rank() == 0:
            save_bases(self.projection.bases, folder)

    # ---- how

    def _install(
        self, blocks: Sequence[Block], *, bases: Mapping[str, Bases] | None = None, tokens: Tokens | None = None
    ) -> None:
        """Takes the given bases, or random ones with main directions of tokens in their place."""
        if not bases:
            bases = random_bases(blocks, self.config, self._pass.device)
        if tokens:
            bases = principal_bases(blocks, self.layers, tokens, bases, self.config.seed)
        self._projection = Projection(blocks, bases, self.config.sketch_dim, self.config.seed, self._pass.device)

    def _prepare(self, dataset: Any, batch_size: int) -> None:
        """Fits what is to be fitted, and checks once that projections are whole and rows are their own."""
        if self._projection is None:
            self._fit(dataset, batch_size)
        if not self._is_checked:
            batch = self._batch_to_check(dataset)
            check_coverage(self._pass, self.projection, batch, self.config.on_uncovered)
            if batch_size > 1:
                check_rows(self._pass, self.projection, batch, self.config.on_uncovered)
            self._is_checked = batch_size > 1

    def _batches(self) -> BatchMaker:
        return BatchMaker(self.model, self.data_collator, self._pass.loss_fn is model_loss)

    def _batch_to_check(self, dataset: Any) -> dict[str, Any]:
        make = self._batches()
        return batch_to_check(self._pass, lambda indices: make(dataset, indices), len(dataset))

    def _collector(self, projection: Projection, optimizer_aware: bool) -> ProjectionCollector:
        collector = ProjectionCollector(self.layers, projection)
        if optimizer_aware:
            from .adam import adam_factors

            collector.factors = adam_factors(self.optimizer_state, self.model, collector.names)
        return collector

    def _gradients(self, rows: Any, projection: Projection, optimizer_aware: bool, batch_size: int) -> Tensor:
        batches = self._batches()
        found = torch.empty(len(rows), projection.dim)
        (window,) = plan_windows(row_lengths(rows), len(rows), batch_size)
        with self._pass.observed(self._collector(projection, optimizer_aware)) as collector:
            for indices in window.batches:
                gradients, counts = self._pass.project(collector, batches(rows, indices))
                if empty := [i for i, count in zip(indices, counts, strict=True) if count == 0]:
                    raise ValueError(
                        f"row {min(empty)} has no label that counts (all are -100 or masked), so it has no gradient; "
                        "give it labels, or raise the length it is truncated to"
                    )
                found[indices] = gradients.float().cpu()
        return found

    @contextmanager
    def _writer(
        self, dataset: Any, folder: str | os.PathLike[str], extra: Mapping[str, Any] | None, window_rows: int
    ) -> Iterator[GradientWriter]:
        identity = {
            **self.identity(),
            "dataset": {
                "content": dataset_fingerprint(dataset),
                "collated": batch_fingerprint(self._batch_to_check(dataset)),
                "rows": len(dataset),
                "world_size": distributed.world_size(),
                "window_rows": window_rows,
            },
        }
        recorded = {"library_version": __version__, "model": model_name(self.model), **(extra or {})}
        writer = GradientWriter(
            folder, identity, dim=self.dim, dtype=self.config.dtype, extra=recorded, rank=distributed.rank()
        )
        try:
            if not writer.num_rows:
                self.save_fit(folder)
            yield writer
        finally:
            writer.close()
