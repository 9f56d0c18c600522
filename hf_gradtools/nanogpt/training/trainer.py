"""`Trainer` on blocks of tokens: nanoGPT's optimizer, schedule and evaluation, whole checkpoints, a stop at NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from hf_gradtools.core.atomic import write_json_atomically
from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.modeling_nanogpt import NanoGPTForCausalLM
from hf_gradtools.nanogpt.training.callbacks import LossDisplay, Pace
from hf_gradtools.nanogpt.training.loader import block_loader
from hf_gradtools.nanogpt.training.options import TrainOptions
from hf_gradtools.nanogpt.training.samples import draw_sample
from hf_gradtools.workflow.checkpoints import last_checkpoint
from hf_gradtools.workflow.trainer import CheckpointingTrainer


__all__ = ["FIGURES", "BlockTrainer"]

logger = logging.get_logger(__name__)

FIGURES = "training.json"
VALIDATION_SEED = 1  # added to the run's, so that no block of validation has the number of one of training


class BlockTrainer(CheckpointingTrainer):
    """Trains a causal LM on a [`TokenFolder`] as [`TrainOptions`] say.

    Args:
        model (`PreTrainedModel`): takes `input_ids` and `shift_labels`.
        args (`TrainingArguments`): made by `training_arguments`.
        options (`TrainOptions`): the rest.
        data (`TokenFolder`): training and validation tokens.
        block_size (`int`): tokens in a block.
        echo (`Callable`): takes the lines that tell of evaluations and samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        options: TrainOptions,
        data: TokenFolder,
        block_size: int,
        echo: Callable[[str], None],
    ):
        self.options, self.data = options, data
        self.train_batches = options.max_iters * options.gradient_accumulation_steps
        samples = self.train_batches * options.batch_size * args.world_size
        self.pace, self.display = Pace(options), LossDisplay(options.progress, echo)
        super().__init__(
            model,
            args,
            train_dataset=data.blocks("train", block_size, options.seed, samples),
            eval_dataset=data.blocks("val", block_size, options.seed + VALIDATION_SEED),
            processing_class=data.tokenizer if data.has_tokenizer else None,
            callbacks=[self.pace, self.display],
        )
        self._is_nanogpt = isinstance(model, NanoGPTForCausalLM)
        self.num_params = model.num_parameters()
        self._flops_per_token = 6 * model.num_parameters(exclude_embeddings=True)
        # On an accelerator, reading a loss waits for it; there they are read at the log's intervals.
        self._losses: list[torch.Tensor] = []
        self._losses_kept = 1 if args.device.type == "cpu" else options.log_interval

    # ---- what Trainer asks for

    def get_train_dataloader(self) -> Any:
        return block_loader(
            self.train_dataset,
            self.train_batches,
            self.options.batch_size,
            self.args.process_index,
            self.args.world_size,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW in two groups, one of which decays."""
        model = self.model if model is None else model
        decays = self.get_decay_parameter_names(model) if self.options.decay_rule == "name" else None
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[parameter.dim() >= 2 if decays is None else name in decays].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": self.options.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=self.options.learning_rate,
            betas=(self.options.beta1, self.options.beta2),
            fused=True,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """nanoGPT's schedule."""
        peak = self.options.learning_rate or 1.0
        self.lr_scheduler = LambdaLR(
            self.optimizer if optimizer is None else optimizer, lambda i: self.options.learning_rate_at(i) / peak
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 per weight and token; the parameters are counted once, not in each iteration."""
        return self._flops_per_token * inputs["input_ids"].numel()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if len(self._losses) >= self._losses_kept:
            self._check_losses()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm) if self.options.grad_clip else None

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        # Other models compute a loss only if there are labels, which it then leaves unread.
        return inputs if self._is_nanogpt else {**inputs, "labels": inputs["shift_labels"]}

    # ---- evaluation

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of `eval_iters` batches of validation blocks, the same ones each time."""
        options, args = self.options, self.args
        model = self.model_wrapped
        model.eval()
        total = torch.zeros((), device=args.device)
        loader = block_loader(
            self.eval_dataset, options.eval_iters, options.batch_size, args.process_index, args.world_size
        )
        for inputs in loader:
            with self.compute_loss_context_manager():
                total += model(**self._prepare_inputs(inputs)).loss.float()
        model.train()
        mean = total / options.eval_iters
        return float(self.accelerator.reduce(mean, "mean") if args.world_size > 1 else mean)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss; during training also the checkpoint, a sample, and whether patience ends."""
        self._check_losses()
        loss = self.validation_loss()
        if not math.isfinite(loss):
            raise self._diverged("validation loss", loss, self.state.global_step)
        state = self.state
        improved = state.best_metric is None or loss < state.best_metric
        if improved:
            state.best_metric, state.best_global_step = loss, state.global_step
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, state, self.control, metrics)
        if self.is_in_train:
            if not self.options.never_save_checkpoint and (improved or self.options.always_save_checkpoint):
                self._save_checkpoint(self.model, None)
            if self.options.sample_each_eval and self.is_world_process_zero():
                self.display.say(draw_sample(self.model, self.data, self.options))
            self.control.should_training_stop |= self.patience_is_over()
        return metrics

    def patience_is_over(self) -> bool:
        """Whether more than `patience` evaluations in a row were no better than the best."""
        if self.options.patience is None or self.state.best_metric is None:
            return False
        evaluated = [row["step"] for row in self.state.log_history if "eval_loss" in row]
        return sum(step > self.state.best_global_step for step in evaluated) > self.options.patience

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _fill_checkpoint(self, folder: Path) -> None:
        super()._fill_checkpoint(folder)
        write_json_atomically(folder / FIGURES, self.figures())

    def figures(self) -> dict[str, Any]:
        """How far the run is, and how good."""
        history, best = self.state.log_history, self.state.best_metric
        return {
            "iter": self.state.global_step,
            "train_loss": next((row["loss"] for row in reversed(history) if "loss" in row), None),
            "val_loss": next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
            "best_val_loss": best,
            "best_val_iter": self.state.best_global_step,
            "num_params": self.num_params,
            "vocab_size": self.data.vocab_size,
            "better_than_chance": None if best is None else self.data.vocab_size * math.exp(-best),
        }

    # ---- NaN

    def _check_losses(self) -> None:
        losses, self._losses = self._losses, []
        if not losses:
            return
        values = torch.stack(losses).tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                # The last one belongs to the iteration under way, the others to those before it.
                back = (len(values) - 1 - i) // self.options.gradient_accumulation_steps
                raise self._diverged("loss", value, self.state.global_step + 1 - back)

    def _diverged(self, what: str, value: float, iteration: int) -> FloatingPointError:
        self.display.close()
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        kept = (
            f"The last good checkpoint is {checkpoint}, and nothing was written after it"
            if checkpoint is not None
            else "No checkpoint was written"
        )
        options = self.options
        clip = f"lower grad_clip ({options.grad_clip:g})" if options.grad_clip else "set grad_clip=1.0 (it is off)"
        return FloatingPointError(
            f"the {what} is {value} at iteration {iteration}. {kept}. Lower learning_rate "
            f"({options.learning_rate:g}), {clip}, or raise warmup_iters ({options.warmup_iters}), and start again"
            + (f", from there with init_from={str(checkpoint)!r} and another out_dir." if checkpoint else ".")
        )
