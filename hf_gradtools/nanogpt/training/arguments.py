"""What `Trainer` is told of a run's options."""

from __future__ import annotations

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_gradtools.nanogpt.training.options import TrainOptions


__all__ = ["training_arguments"]


def training_arguments(options: TrainOptions, resumed: bool = False) -> TrainingArguments:
    """What `Trainer` itself is told; intervals and checkpoints are not left to it.

    Raises:
        ValueError: this machine has no such device, or it does not compute in `dtype`.
        ImportError: a package that `report_to` names is not installed.
    """
    device = _device_type(options.device)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" and _has_bfloat16(device) else "float32"
    if dtype == "float16" and device == "cpu":
        raise ValueError("dtype='float16' does not train on the CPU. Pass float32 or bfloat16.")
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    arguments = TrainingArguments(
        output_dir=options.out_dir,
        max_steps=options.max_iters,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_grad_norm=options.grad_clip,
        seed=options.seed,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device == "cpu",
        torch_compile=options.compile,
        report_to=_reporters(options.report_to),
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        eval_on_start=not resumed,
        logging_nan_inf_filter=False,
        label_names=["shift_labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        **{"activation_checkpointing" if renamed else "gradient_checkpointing": options.use_gradient_checkpointing},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several devices are for torchrun, not for threads
    return arguments


def _device_type(asked: str) -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = "cpu" if accelerator is None else accelerator.type
    if asked not in ("auto", "cpu", found, f"{found}:0"):
        raise ValueError(
            f"device={asked!r} is not to be had: this machine has {found}. Pass auto, or choose one of several "
            "devices by its environment variable, such as CUDA_VISIBLE_DEVICES."
        )
    return "cpu" if asked == "cpu" else found


def _has_bfloat16(device: str) -> bool:
    return device != "cuda" or torch.cuda.is_bf16_supported()


def _reporters(asked: str) -> list[str] | str:
    """The names in `report_to`, separated by commas."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if names in ([], ["none"], ["all"]):
        return names[0] if names else "none"
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to={asked!r}: {name!r} is none of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
        if name not in get_available_reporting_integrations():
            raise ImportError(f"report_to={asked!r} needs a package that is not installed: pip install {name}")
    return names
