"""`GritController`: measures the rank space while a model trains, and steers its optimizer by it.

```python
model = get_peft_model(base, GritConfig(target_modules="all-linear"))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
with GritController(model, optimizer, total_steps=len(batches)) as controller:
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
```

Everything hangs on hooks: one on the model's forward (its attention mask), one on each layer's `lora_A` (its output
and the gradient arriving there), and two around the optimizer's step. So any trainer has it, and type and options of
the optimizer stay as they are; what rank-SOAP turned in its state is turned back at the end.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_gradtools.core.capture import Tap
from hf_gradtools.core.distributed import mean_over_ranks
from hf_gradtools.grit.bases import build_preconditioner, decompose, rebase
from hf_gradtools.grit.batch import Batch, reads_encoder
from hf_gradtools.grit.checks import (
    find_tuner,
    first_cut_step,
    only_active_adapter,
    rank_change,
    torch_optimizer,
    trainable_layers,
)
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.cut import Cut, cut_layers, replace_matrices
from hf_gradtools.grit.fisher import RankFisher, fold
from hf_gradtools.grit.layer import SteeredLayer
from hf_gradtools.grit.preconditioner import Preconditioner
from hf_gradtools.grit.regularizers import Regularizers
from hf_gradtools.grit.schedule import LossWindow


logger = logging.getLogger(__name__)

_STEERED: WeakSet[torch.optim.Optimizer] = WeakSet()  # two controllers on one would undo each other's rotations


class GritController:
    """Attaches GRIT to a model and its optimizer.

    Args:
        model: a `PeftModel` (or its tuner) whose active adapter was made from a [`GritConfig`].
        optimizer: of its parameters; accelerate's wrapper is seen through.
        total_steps: optimizer steps of the whole training; needed where the config gives a share of them.
        accumulation_steps: micro-batches of a step, if each one's loss is a mean that is divided by this.
        grad_scale: returns the loss scaler's factor on the gradients that backward computes; default 1.

    Attributes:
        step: optimizer steps taken.
        layers: what is steered.
        fishers: the factors, by layer.
        bases: by layer what gradients are multiplied with, see [`decompose`].
        live_ranks: by layer; below the tensors' own rank where coordinates are masked.
        figures: what to log, by name.

    Raises:
        ValueError: the adapter is none of GRIT or not trainable; the optimizer or sharding is not supported; a share
            of training is given, and not how long it is.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        total_steps: int | None = None,
        accumulation_steps: int = 1,
        grad_scale: Callable[[], float] = lambda: 1.0,
    ):
        self.tuner = find_tuner(model)
        self.adapter = only_active_adapter(self.tuner)
        self.config: GritConfig = self.tuner.peft_config[self.adapter]
        self.optimizer = torch_optimizer(optimizer, self.config)
        self.rank_change = rank_change(self.config)
        self.first_cut_step = first_cut_step(self.config, total_steps)
        self.accumulation_steps, self.grad_scale = accumulation_steps, grad_scale
        self.layers = trainable_layers(self.tuner, self.adapter, self.optimizer)
        self.step = self.last_refresh = self.last_cut = 0
        self.skipped_sums = self.failed_inversions = 0
        self.figures: dict[str, float] = {}
        self.losses = LossWindow()
        self.fishers = {layer.name: RankFisher(layer.A) for layer in self.layers}
        self.bases: dict[str, Tensor] = {}
        self.live_ranks = {layer.name: layer.rank for layer in self.layers}
        self.held = {layer.name: (layer.A, layer.B) for layer in self.layers}  # the parameters the optimizer has
        self.kept_energy: dict[str, float] = {}  # what the cuts so far have left, of each spectrum that τ is of
        self._regularizers = Regularizers(self.config)
        self._preconditioner: Preconditioner | None = None
        self._batch: Batch | None = None
        self._loss: Tensor | None = None
        self._collecting = True
        self._is_turned = self._is_rotated = False  # gradients; parameters
        self._remove: list[Callable[[], Any]] = []

    # ---- attaching

    def attach(self) -> None:
        """Sets the hooks; a config with every mechanism off needs none."""
        if self._remove or self.config.is_passive:
            return
        if self.optimizer in _STEERED:
            raise ValueError("another GritController is attached to this optimizer; detach() it first.")
        _STEERED.add(self.optimizer)
        base = self.tuner.model
        add = self._remove.append
        add(base.register_forward_pre_hook(self._note_batch, with_kwargs=True).remove)
        if self.config.adaptive_schedule:
            add(base.register_forward_hook(self._note_loss, with_kwargs=True).remove)
        for layer in self.layers:
            hook = self._tap(layer, reads_encoder(layer.name, base))
            add(layer.down.register_forward_hook(hook).remove)
        add(self.optimizer.register_step_pre_hook(self._before_step).remove)
        add(self.optimizer.register_step_post_hook(self._after_step).remove)

    def detach(self) -> None:
        """Removes every hook, and turns the optimizer's moments back into plain coordinates; safe to call twice."""
        if not self._remove:
            return
        while self._remove:
            self._remove.pop()()
        _STEERED.discard(self.optimizer)
        if self.config.preconditioner == "rank_soap":
            for layer in self.layers:
                if layer.name in self.bases and layer.A is self.held[layer.name][0]:
                    rebase(self.optimizer, layer, self.bases[layer.name], None)
        self.bases.clear()
        self._preconditioner = None

    def __enter__(self) -> GritController:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
        if exc[0] is None:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Training is over: tensors whose coordinates were only masked become as small as their rank."""
        for layer in self.layers:
            self.follow_parameters(layer)
            live = self.live_ranks[layer.name]
            if self.rank_change == "masked" and live < layer.rank:
                for state in (self.optimizer.state.get(p, {}) for p in (layer.A, layer.B)):
                    for name, value in state.items():
                        if isinstance(value, Tensor) and value.ndim == 2:
                            state[name] = value[:live] if value.shape == layer.A.shape else value[:, :live]
                replace_matrices(self, layer, layer.A[:live], layer.B[:, :live])

    def follow_parameters(self, layer: SteeredLayer) -> None:
        """Hands the optimizer parameters that somebody else has put in place of those it holds, with a fresh state:
        loading a checkpoint of another rank does."""
        for old, new in zip(self.held[layer.name], (layer.A, layer.B), strict=True):
            if old is not new:
                self.optimizer.state.pop(old, None)
                for group in self.optimizer.param_groups:
                    group["params"] = [new if p is old else p for p in group["params"]]
        self.held[layer.name] = layer.A, layer.B

    # ---- measuring

    def begin_step(self) -> None:
        """Drops what a step that was not taken (a loss scaler's overflow) has left; `Trainer` callbacks call it."""
        for fisher in self.fishers.values():
            fisher.discard()
        self._loss = self._batch = None
        self._is_turned = False

    def _note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._collecting and module.training and torch.is_grad_enabled():
            named = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) if args else {}
            self._batch = Batch.of({**named, **kwargs}, module, self.accumulation_steps, after=self._batch)

    def _note_loss(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and torch.is_grad_enabled() and loss is not None:
            parts = 1 if "num_items_in_batch" in kwargs else self.accumulation_steps
            self._loss = loss.detach() / parts + (0 if self._loss is None else self._loss)

    def _tap(self, layer: SteeredLayer, sees_encoder: bool) -> Callable[..., Any]:
        fisher = self.fishers[layer.name]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Without gradients it is an evaluation, or the first pass of reentrant checkpointing: the second counts.
            if not (self._collecting and module.training and torch.is_grad_enabled() and output.requires_grad):
                return output
            batch = self._batch or Batch()

            def count(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
                mask = batch.rows(layer.name, saved[0], sees_encoder)
                fisher.add(saved[0], grads[0], mask, batch.loss_divisor)

            tapped: Tensor = Tap.apply(count, 1, output, output)[0]
            return tapped

        return hook

    # ---- the step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(arg is not None for arg in (*args[1:], *kwargs.values())):  # args[0] is the optimizer
            raise ValueError("optimizer.step(closure) evaluates the model inside the step; GRIT cannot follow it.")
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers are called, and skip the step themselves
        if overflow is not None and bool(overflow > 0):
            self.begin_step()
            return
        if not self._is_turned:
            scale = getattr(optimizer, "grad_scale", None)  # of fused optimizers that unscale by themselves
            self.precondition(1.0 if scale is None else float(scale))
        if self._preconditioner is not None and self._preconditioner.rotates:
            self._preconditioner.turn_parameters(any(group.get("weight_decay") for group in optimizer.param_groups))
            self._is_rotated = True

    @torch.no_grad()
    def precondition(self, grads_scale: float = 1.0) -> None:
        """Takes the step's statistics in, and turns the gradients. Before the optimizer's step it runs by itself; a
        trainer that clips what comes out of it calls it earlier.

        Args:
            grads_scale: what the gradients in `.grad` are still multiplied with by a loss scaler.
        """
        self._is_turned = True
        if self._collecting:
            self._fold()
        self._follow_loss()
        if self.step >= self.config.ng_warmup_steps and (
            not self.bases or self._has_passed(self.config.kfac_update_freq, self.last_refresh)
        ):
            self.refresh()
        losses = self._regularizers.add_grads(self, grads_scale)
        if self._preconditioner is not None:
            self._preconditioner.turn_gradients()
        if self._collecting:
            self.figures.update({name: float(loss) for name, loss in losses.items()})
            self.figures["natural_grad_norm"] = self.grad_norm() / grads_scale

    def _fold(self) -> None:
        decay = self.config.ema_decay if self.config.statistics == "ema" else None
        scale = self.grad_scale() / (1.0 if self._batch is None else self._batch.shared_divisor())
        self.skipped_sums += fold(list(self.fishers.values()), decay, scale)

    def grad_norm(self) -> float:
        """Of the adapter's gradients, all layers together."""
        grads = [p.grad for layer in self.layers for p in (layer.A, layer.B) if p.grad is not None]
        return float(nn.utils.get_total_norm(grads)) if grads else 0.0

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_rotated and self._preconditioner is not None:
            self._preconditioner.turn_steps_back()
            self._is_rotated = False
        if not self._is_turned:
            return  # the step was skipped
        self._is_turned, self._batch = False, None
        self.step += 1
        # After a warm-up the first cut does not wait for a whole interval as well.
        is_first = self.last_cut == 0 < self.first_cut_step
        if self.step >= self.first_cut_step and (
            is_first or self._has_passed(self.config.reprojection_freq, self.last_cut)
        ):
            self.last_cut = self.step
            self.cut()
        self._collecting = self.step % self.config.grit_cov_update_freq == 0

    def _has_passed(self, frequency: int, since: int) -> bool:
        return self.step - since >= self.losses.frequency(frequency)

    def _follow_loss(self) -> None:
        if self._loss is not None:
            loss = self._loss.float()
            mean_over_ranks([loss])
            self.losses.observe(float(loss))
            self._loss = None

    def continue_from_state(self) -> None:
        """Picks up after `load_state`: what is derived from the state."""
        self._collecting = self.step % self.config.grit_cov_update_freq == 0
        self._preconditioner = build_preconditioner(self.config, self.layers, self.bases)

    # ---- factors and ranks

    def measured_layers(self) -> list[tuple[SteeredLayer, Tensor]]:
        """Layers with enough samples, and their factors `[2, R, R]`."""
        return [
            (layer, self.fishers[layer.name].factors)
            for layer in self.layers
            if self.fishers[layer.name].samples >= self.config.kfac_min_samples
        ]

    def live_factors(self) -> list[tuple[SteeredLayer, Tensor]]:
        """The same, of the coordinates in use only."""
        return [(x, f[:, :live, :live]) for x, f in self.measured_layers() for live in [self.live_ranks[x.name]]]

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes eigenbases or inverses of the factors as they are now. If that fails, those of before stay."""
        config, measured = self.config, self.measured_layers()
        if config.preconditioner is None or not measured:
            return
        damping = self.losses.damping(config.kfac_damping) if config.adaptive_schedule else config.kfac_damping
        self.figures["damping"] = damping
        try:
            new = decompose(config, measured, self.live_ranks, damping)
        except torch.linalg.LinAlgError as error:
            self.failed_inversions += 1
            logger.warning("step %d: the factors could not be inverted, the last ones stay: %s", self.step, error)
            return
        if config.preconditioner == "rank_soap":
            for layer, _ in measured:
                rebase(self.optimizer, layer, self.bases.get(layer.name), new[layer.name])
        self.bases.update(new)
        self.last_refresh = self.step
        self._preconditioner = build_preconditioner(config, self.layers, self.bases)

    @torch.no_grad()
    def cut(self, rank: int | None = None) -> list[Cut]:
        """Cuts the adapter now, as the config says or every layer to `rank`.

        Returns:
            what was done to each layer that was cut.

        Raises:
            ValueError: `rank` is no positive whole number, or the adapter is merged.
        """
        cuts = cut_layers(self, rank)
        self._regularizers.forget()
        if self.config.preconditioner != "rank_soap" and any(cut.name not in self.bases for cut in cuts):
            self.refresh()  # inverses are of the old coordinates; eigenbases have followed
        self._preconditioner = build_preconditioner(self.config, self.layers, self.bases)
        return cuts
