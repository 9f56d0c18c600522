"""What `Trainer` is told of a run's options."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from hf_gradtools.gradmem.training.options import TrainOptions


__all__ = ["training_arguments"]


def training_arguments(options: TrainOptions, resumed: bool = False) -> TrainingArguments:
    """Trainer's own arguments.

    Args:
        options ([`TrainOptions`]): the run.
        resumed (`bool`, defaults to `False`): its first evaluation is in its log already.
    """
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    return TrainingArguments(
        output_dir=options.exp_path,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_batch_size,
        per_device_eval_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=not resumed,
        save_strategy="steps",
        save_steps=options.eval_steps,
        logging_steps=options.logging_steps,
        report_to=options.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,  # the bar is ours
        **{"activation_checkpointing" if renamed else "gradient_checkpointing": options.use_gradient_checkpointing},
    )
