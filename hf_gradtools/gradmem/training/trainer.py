"""`Trainer` for gradient memories: a learning rate for inner steps, evaluation, curriculum, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_gradtools.gradmem.training.evaluation import evaluate_batches
from hf_gradtools.gradmem.training.progress import best_evaluation, current_stage, is_over
from hf_gradtools.gradmem.training.stages import Stage
from hf_gradtools.workflow.loader import ConsecutiveBatches
from hf_gradtools.workflow.trainer import CheckpointingTrainer


__all__ = ["GradMemTrainer"]

INNER_LR = "inner_lr"
Rows = list[dict[str, Any]]
Collator = Callable[[Rows], dict[str, torch.Tensor]]


class GradMemTrainer(CheckpointingTrainer):
    """Trains a model with a memory, or the backbone alone on prompts, stage after stage.

    The order of the rows depends on `args.seed` alone, and where the run stands on its log alone. So a run that is
    killed and goes on from a checkpoint gives, bit by bit, what it would have given.

    Args:
        model (`PreTrainedModel`): a `GradMemGPTForCausalLM`, or any causal LM for batches without contexts.
        args (`TrainingArguments`): with `max_steps`, and `save_steps` equal to `eval_steps`.
        stages (`Sequence[Stage]`): of the curriculum; one is no curriculum.
        data_collator (`Callable`): makes batches of training rows.
        eval_collator (`Callable`, *optional*): makes batches of validation rows, default the same.
        processing_class (`PreTrainedTokenizerBase`, *optional*): saved with the model.
        inner_lr_multiplier (`float`): the learning rate of a learned `inner_lr`, as a multiple of the others'.
        final_lr_ratio (`float`): share of its peak at which a learning rate ends that would fall to 0.
        ignored_ids (`tuple[int, ...]`): structure symbols that accuracy does not count.
        eval_K (`int`, *optional*): steps of a write in evaluation, default the model's.
        eval_generation (`bool`): whether evaluation generates, too.
        curriculum_threshold (`float`): exact match that ends a stage.
        stop_at (`float`): exact match in the last stage that ends the run.
        patience (`int`, *optional*): evaluations in a row without a new best one that end the run.
        callbacks (`list`, *optional*): more of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        stages: Sequence[Stage],
        data_collator: Collator,
        eval_collator: Collator | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        inner_lr_multiplier: float = 20.0,
        final_lr_ratio: float = 0.1,
        ignored_ids: tuple[int, ...] = (),
        eval_K: int | None = None,
        eval_generation: bool = True,
        curriculum_threshold: float = 0.95,
        stop_at: float = 1.0,
        patience: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.max_steps < 1:
            raise ValueError(f"max_steps={args.max_steps} must be at least 1: rows are drawn without an end.")
        self.stages, self.eval_collator = stages, eval_collator or data_collator
        self.inner_lr_multiplier, self.final_lr_ratio = inner_lr_multiplier, final_lr_ratio
        self.ignored_ids, self.eval_K, self.eval_generation = ignored_ids, eval_K, eval_generation
        self.curriculum_threshold, self.stop_at, self.patience = curriculum_threshold, stop_at, patience
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=_CurrentRows(self),
            eval_dataset=stages[0].valid,
            processing_class=processing_class,
            callbacks=[_Progress(self), *(callbacks or [])],
        )

    @property
    def stage(self) -> int:
        """Number of the stage that the run is in."""
        return current_stage(self.state.log_history, self.curriculum_threshold, len(self.stages))

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its aim, or its patience is over."""
        return is_over(self.state.log_history, len(self.stages), self.stop_at, self.patience)

    # ---- training

    def get_train_dataloader(self) -> DataLoader[Any]:
        args = self.args
        batches = args.max_steps * args.gradient_accumulation_steps
        return DataLoader(
            self.train_dataset,
            batch_sampler=ConsecutiveBatches(
                batches, args.per_device_train_batch_size, args.process_index, args.world_size
            ),
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it would draw from the generator of dropout
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with `inner_lr` in a group of its own."""
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        inner_lr = getattr(model, INNER_LR, None)
        if isinstance(inner_lr, nn.Parameter):
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter is not inner_lr]
            rate = self.args.learning_rate * self.inner_lr_multiplier
            optimizer.add_param_group({"params": [inner_lr], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's, falling to `final_lr_ratio` where that falls to 0."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if created:
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduler.lr_lambdas = [self._ending_above_0(share, warmup) for share in scheduler.lr_lambdas]
        return scheduler

    def _ending_above_0(self, share: Callable[[int], float], warmup: int) -> Callable[[int], float]:
        least = self.final_lr_ratio
        return lambda step: share(step) if step < warmup else least + (1 - least) * share(step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the learned `inner_lr`."""
        inner_lr = getattr(self.model, INNER_LR, None)
        if isinstance(inner_lr, nn.Parameter) and "loss" in logs:
            logs[INNER_LR] = inner_lr.item()
        super().log(logs, start_time)

    # ---- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The current stage's validation rows, dealt to the processes."""
        args = self.args
        is_own = eval_dataset is None or eval_dataset is self.eval_dataset
        rows = self.stages[self.stage].valid if is_own else eval_dataset
        if len(rows) < args.world_size:
            raise ValueError(f"{len(rows)} validation rows are too few for {args.world_size} processes.")
        return DataLoader(
            rows.shard(args.world_size, args.process_index),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            generator=torch.Generator(),
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """[`evaluate_batches`], with the number of the stage."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        with self.compute_loss_context_manager():
            metrics = evaluate_batches(
                model,
                map(self._prepare_inputs, dataloader),
                self.ignored_ids,
                K=self.eval_K,
                generation=self.eval_generation,
                total=lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum").cpu(),
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_stage"] = self.stage
        rows = len(dataloader.dataset) * self.args.world_size
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)


class _CurrentRows(Dataset[dict[str, Any]]):
    """The training rows of the stage that a run is in when they are asked for."""

    def __init__(self, trainer: GradMemTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        args = self.trainer.args
        return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> Rows:
        return self.trainer.stages[self.trainer.stage].train.rows(numbers)


class _Progress(TrainerCallback):
    """Ends the run, keeps the best evaluation, and lets no checkpoint fall between two entries of the log."""

    def __init__(self, trainer: GradMemTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True
        control.should_log |= control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = best_evaluation(state.log_history)
        if best is not None:
            state.best_metric, state.best_global_step = best["eval_exact_match"], best["step"]
        if self.trainer.is_in_train:
            control.should_training_stop |= self.trainer.is_over
            if state.global_step == 0:  # the evaluation before training, after which Trainer saves nothing
                self.trainer._save_checkpoint(self.trainer.model, None)
