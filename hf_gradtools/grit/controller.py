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
and the gradient arriving there), and two around the optimizer's step. So any trainer has it, and `state_dict`,
type and options of the optimizer stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_gradtools.core.capture import Tap
from hf_gradtools.core.curvature import damped_inverse, eigenbasis, inverse_power
from hf_gradtools.core.distributed import is_sharded, mean_over_ranks, world_size
from hf_gradtools.grit.batch import Batch, is_encoder_decoder, reads_encoder
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.cut import Cut, cut_layers
from hf_gradtools.grit.fisher import RankFisher, fold
from hf_gradtools.grit.layer import SteeredLayer
from hf_gradtools.grit.model import GritModel
from hf_gradtools.grit.moments import change_basis, check_optimizer
from hf_gradtools.grit.preconditioner import Preconditioner, Turn
from hf_gradtools.grit.regularizers import add_regularizer_grads
from hf_gradtools.grit.schedule import LossWindow


logger = logging.getLogger(__name__)


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
        self.adapter = _only_active_adapter(self.tuner)
        self.config: GritConfig = self.tuner.peft_config[self.adapter]
        self.optimizer = _torch_optimizer(optimizer)
        self.first_cut_step = _first_cut_step(self.config, total_steps)
        self.accumulation_steps, self.grad_scale = accumulation_steps, grad_scale
        self.layers = _trainable_layers(self.tuner, self.adapter, self.optimizer)
        if self.config.preconditioner == "rank_soap" or self.config.reprojection:
            check_optimizer(self.optimizer)
        self.step = 0
        self.skipped_sums = self.failed_inversions = 0
        self.figures: dict[str, float] = {}
        self.losses = LossWindow()
        self.fishers = {layer.name: RankFisher(layer.A) for layer in self.layers}
        self.live_ranks = {layer.name: layer.rank for layer in self.layers}
        self.bases: dict[str, Tensor] = {}  # [2, R, R] by layer: eigenvectors (or inverses) of both factors
        self.kept_energy: dict[str, float] = {}  # what the cuts so far have left, of each spectrum that τ is of
        self.last_refresh = self.last_cut = 0
        self._preconditioner: Preconditioner | None = None
        self._batch: Batch | None = None
        self._loss: Tensor | None = None
        self._collecting = True
        self._turned_early = self._rotated = False
        self._remove: list[Callable[[], Any]] = []

    # ---- attaching

    def attach(self) -> None:
        """Sets the hooks; a config with every mechanism off needs none."""
        if self._remove or self.config.is_passive:
            return
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
        """Removes every hook; safe to call twice."""
        while self._remove:
            self._remove.pop()()

    def __enter__(self) -> GritController:
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
        if exc[0] is None:
            self.finish()

    def finish(self) -> None:
        """Training is over: tensors whose coordinates were only masked become as small as their rank."""
        if self.rank_change != "masked":
            return
        for layer in self.layers:
            live = self.live_ranks[layer.name]
            if live < layer.rank:
                self.tuner.resize(layer, layer.A.detach()[:live], layer.B.detach()[:, :live])

    # ---- measuring

    def begin_step(self) -> None:
        """Drops what a step that was not taken (a loss scaler's overflow) has left; `Trainer` callbacks call it."""
        for fisher in self.fishers.values():
            fisher.discard()
        self._loss = None

    def _note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._collecting and module.training:
            self._batch = Batch.of(kwargs, is_encoder_decoder(module), self.accumulation_steps)

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
            batch = self._batch or Batch(None, None, 1.0)
            mask = batch.rows(output, sees_encoder)

            def count(grads: tuple[Tensor, ...], saved: tuple[Tensor, ...]) -> None:
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
            self._rotated = False
            return
        if not self._turned_early:
            self.precondition()
        self._turned_early = False
        self._rotated = self._preconditioner is not None and self._preconditioner.rotate
        if self._rotated and self._preconditioner is not None:
            self._preconditioner.turn_parameters(any(group.get("weight_decay") for group in optimizer.param_groups))

    def precondition(self) -> None:
        """Takes the step's statistics in, and turns the gradients. Before the optimizer's step it runs by itself; a
        trainer that clips what comes out of it calls it earlier."""
        self._turned_early = True
        if self._collecting:
            decay = self.config.ema_decay if self.config.statistics == "ema" else None
            self.skipped_sums += fold(list(self.fishers.values()), decay, self.grad_scale())
        self._follow_loss()
        if self.step >= self.config.ng_warmup_steps and (
            not self.bases or self._has_passed(self.config.kfac_update_freq, self.last_refresh)
        ):
            self.refresh()
        scale = getattr(self.optimizer, "grad_scale", None)
        losses = add_regularizer_grads(self.config, self.measured_layers(), self.step, 1.0 if scale is None else scale)
        if self._collecting:
            self.figures.update({name: float(loss) for name, loss in losses.items()})
        if self._preconditioner is not None:
            self._preconditioner.turn_gradients()
            if self._collecting:
                norms = torch._foreach_norm([p.grad for x in self.layers for p in (x.A, x.B) if p.grad is not None])
                self.figures["natural_grad_norm"] = float(torch.stack(norms).norm())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rotated and self._preconditioner is not None:
            self._preconditioner.turn_steps_back()
        self._rotated = False
        self.step += 1
        if self.step >= self.first_cut_step and self._has_passed(self.config.reprojection_freq, self.last_cut):
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
        self._build_preconditioner()

    # ---- factors

    def measured_layers(self) -> list[tuple[SteeredLayer, Tensor]]:
        """Layers with enough samples, and their factors `[2, R, R]`."""
        return [
            (layer, self.fishers[layer.name].factors)
            for layer in self.layers
            if self.fishers[layer.name].samples >= self.config.kfac_min_samples
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes eigenbases or inverses of the factors as they are now. If that fails, those of before stay."""
        config, measured = self.config, self.measured_layers()
        if config.preconditioner is None or not measured:
            return
        damping = self.losses.damping(config.kfac_damping) if config.adaptive_schedule else config.kfac_damping
        self.figures["damping"] = damping
        try:
            new = self._decompose(measured, damping)
        except torch.linalg.LinAlgError as error:
            self.failed_inversions += 1
            logger.warning("step %d: the factors could not be inverted, the last ones stay: %s", self.step, error)
            return
        if config.preconditioner == "rank_soap":
            for layer, _ in measured:
                self._rebase(layer, new[layer.name])
        self.bases.update(new)
        self.last_refresh = self.step
        self._build_preconditioner()

    def _decompose(self, measured: list[tuple[SteeredLayer, Tensor]], damping: float) -> dict[str, Tensor]:
        """`[2, R, R]` per layer, computed for all layers of one rank together."""
        config, result = self.config, {}
        groups: dict[tuple[Any, ...], list[tuple[SteeredLayer, Tensor]]] = defaultdict(list)
        for layer, factors in measured:
            device = config.kfac_inversion_device or factors.device
            groups[self.live_ranks[layer.name], layer.rank, str(device)].append((layer, factors))
        for (live, rank, device), members in groups.items():
            factors = torch.stack([f[:, :live, :live] for _, f in members]).to(device)
            if config.preconditioner == "rank_soap":
                matrices = eigenbasis(factors)[1]
            elif config.kfac_exponent == 1:
                matrices = damped_inverse(factors, damping)[0]
            else:
                matrices = inverse_power(factors, damping, config.kfac_exponent)
            whole = torch.eye(rank, dtype=matrices.dtype, device=matrices.device).repeat(len(members), 2, 1, 1)
            whole[..., :live, :live] = matrices
            result.update((layer.name, m) for (layer, _), m in zip(members, whole, strict=True))
        return result

    def _rebase(self, layer: SteeredLayer, new: Tensor) -> None:
        """Carries the optimizer's moments from a layer's old eigenbases into new ones."""
        old = self.bases.get(layer.name)
        old = torch.eye(layer.rank, dtype=new.dtype, device=new.device).expand(2, -1, -1) if old is None else old
        on = layer.A.device
        for_up, for_down = (new.mT @ old).to(on)  # B works in the activations' basis, A in the gradients'
        change_basis(self.optimizer, layer.A, lambda m: for_down @ m, lambda v: for_down.square() @ v)
        change_basis(self.optimizer, layer.B, lambda m: m @ for_up.mT, lambda v: v @ for_up.square().mT)

    def _build_preconditioner(self) -> None:
        turns, swapped = [], self.config.preconditioner == "grit"
        for layer in self.layers:
            if layer.name in self.bases:
                activation, gradient = self.bases[layer.name]
                turns.append(Turn(layer.A, activation if swapped else gradient, is_up=False))
                turns.append(Turn(layer.B, gradient if swapped else activation, is_up=True))
        rotate = self.config.preconditioner == "rank_soap"
        self._preconditioner = Preconditioner(turns, rotate, self.config.grafting) if turns else None

    # ---- ranks

    @property
    def rank_change(self) -> str:
        if self.config.rank_change == "auto":
            return "physical" if world_size() == 1 else "masked"
        return self.config.rank_change

    @torch.no_grad()
    def cut(self, rank: int | None = None) -> list[Cut]:
        """Cuts the adapter now, as the config says or every layer to `rank`.

        Returns:
            what was done to each layer that was cut.
        """
        cuts = cut_layers(self, rank)
        if cuts:
            self._build_preconditioner()
        return cuts


def find_tuner(model: nn.Module) -> GritModel:
    """The GRIT tuner of a model, seen through PEFT's and DDP's wrappers.

    Raises:
        ValueError: the model has none.
    """
    model = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, GritModel):
        kind = f"an adapter of type {model.peft_type.value}" if isinstance(model, PeftModel) else "no adapter"
        raise ValueError(
            f"{type(model).__name__} has {kind}; GRIT steers get_peft_model(model, GritConfig(...)), or "
            "SFTTrainer(peft_config=GritConfig(...))."
        )
    return tuner


def _only_active_adapter(tuner: GritModel) -> str:
    active = tuner.active_adapters
    if len(active) != 1:
        raise ValueError(f"adapters {active} are active; GRIT trains one at a time: call set_adapter(name).")
    return active[0]


def _first_cut_step(config: GritConfig, total_steps: int | None) -> float:
    """The step from which on the adapter is cut; infinity for never."""
    warmup = config.reprojection_warmup_steps
    if config.reprojection is None:
        return math.inf
    if warmup == 0 or warmup >= 1:
        return warmup
    if total_steps is None:
        raise ValueError(
            f"reprojection_warmup_steps={warmup} is a share of training. Pass total_steps= (a Trainer's callback "
            "does), or give the config a number of steps."
        )
    return math.ceil(warmup * total_steps)


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    from accelerate.optimizer import AcceleratedOptimizer

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(inner).__name__}, which runs no torch step hooks (DeepSpeed's own do not); GRIT "
            "needs a torch.optim.Optimizer."
        )
    return inner


def _trainable_layers(tuner: GritModel, adapter: str, optimizer: torch.optim.Optimizer) -> list[SteeredLayer]:
    layers = [layer for layer in tuner.layers(adapter) if layer.A.requires_grad and layer.B.requires_grad]
    if not layers:
        raise ValueError(f"adapter {adapter!r} is frozen; load it with is_trainable=True.")
    if any(is_sharded(layer.A) or layer.A.ndim != 2 for layer in layers):
        raise ValueError("FSDP shards the adapter's rank axis, which GRIT needs whole; train with DDP, or use LoRA.")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := [layer.name for layer in layers if layer.A not in owned or layer.B not in owned]:
        raise ValueError(
            f"the optimizer does not hold the adapter of {missing[0]} and {len(missing) - 1} more layers."
        )
    return layers
