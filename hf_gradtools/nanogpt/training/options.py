"""Options of a training run, by nanoGPT's names. Imports nothing heavy, so that the command line can show them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


__all__ = ["TrainOptions"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
DECAY_RULES = ("ndim", "name")


def _in(group: str, default: Any) -> Any:
    return field(default=default, metadata={"group": group})


@dataclass
class TrainOptions:
    """Everything of a run but the model's own sizes and variants.

    An iteration is one optimizer step, on `gradient_accumulation_steps` batches of `batch_size` blocks per process.

    Args:
        dataset: a folder of token files (see `prepare`), its name under data/, or "shakespeare_char".
        data_dtype: uint8, uint16 or uint32, for a dataset that does not say so: one of nanoGPT without meta.pkl.
        out_dir: folder of the trained model and its checkpoints.
        overwrite_out_dir: start anew in a folder that holds an earlier run or another model, which is replaced.
        init_from: "scratch"; "resume" to continue the run in out_dir; "gpt2", "gpt2-medium", ... to import GPT-2; or a
            folder, Hub id, or nanoGPT ckpt.pt to start from.
        batch_size: blocks in a batch.
        gradient_accumulation_steps: batches in an iteration.
        max_iters: iterations.
        learning_rate: at its peak.
        decay_lr: lower the learning rate along a cosine after the warmup; else it stays.
        min_lr: where the cosine ends; default a tenth of learning_rate.
        warmup_iters: iterations in which the learning rate rises linearly.
        lr_decay_iters: iteration at which the cosine ends; default max_iters.
        weight_decay: of the parameters that decay_rule names.
        decay_rule: "ndim" decays what has at least two dimensions, as nanoGPT does; "name" all but norms and biases,
            as transformers does.
        beta1: of AdamW.
        beta2: of AdamW.
        grad_clip: norm to which gradients are cut; 0 to leave them.
        seed: of the weights, the data and dropout.
        eval_interval: iterations between evaluations, after each of which a checkpoint is written.
        eval_iters: validation batches in an evaluation, always the same ones.
        eval_only: evaluate the model that init_from names, and stop.
        patience: stop once so many evaluations in a row, and one more, were no better than the best.
        always_save_checkpoint: write a checkpoint after every evaluation; else only after one that is the best so far,
            from which a resumed run then continues.
        never_save_checkpoint: write no model at all, only the figures.
        log_interval: iterations between entries of the log.
        report_to: where Trainer logs to, such as tensorboard.
        progress: show a progress bar.
        sample_each_eval: show a text of the model's own after each evaluation.
        sample_start_tokens: how that text begins.
        max_sample_tokens: its length.
        sample_temperature: of its softmax.
        sample_top_k: tokens that it chooses from; 0 for all.
        device: "auto", "cpu", or the type of the accelerator of this machine, such as cuda.
        dtype: of the computation; weights stay float32. "auto" is bfloat16 on accelerators that have it.
        compile: compile the model.
        use_gradient_checkpointing: compute activations anew in the backward pass instead of keeping them.

    Raises:
        ValueError: an option is out of range, or contradicts another.
    """

    # What a resumed run may change.
    free: ClassVar[tuple[str, ...]] = (
        "out_dir", "overwrite_out_dir", "init_from", "max_iters", "eval_only", "patience", "always_save_checkpoint",
        "never_save_checkpoint", "log_interval", "report_to", "progress", "sample_each_eval", "sample_start_tokens",
        "max_sample_tokens", "sample_temperature", "sample_top_k", "device", "compile", "use_gradient_checkpointing",
    )  # fmt: skip

    dataset: str = _in("Data", "shakespeare_char")
    data_dtype: str | None = _in("Data", None)
    out_dir: str = _in("Data", "out")
    overwrite_out_dir: bool = _in("Data", False)
    init_from: str = _in("Training", "scratch")
    batch_size: int = _in("Training", 12)
    gradient_accumulation_steps: int = _in("Training", 1)
    max_iters: int = _in("Training", 5000)
    learning_rate: float = _in("Training", 1e-3)
    decay_lr: bool = _in("Training", True)
    min_lr: float | None = _in("Training", None)
    warmup_iters: int = _in("Training", 100)
    lr_decay_iters: int | None = _in("Training", None)
    weight_decay: float = _in("Training", 0.1)
    decay_rule: str = _in("Training", "ndim")
    beta1: float = _in("Training", 0.9)
    beta2: float = _in("Training", 0.99)
    grad_clip: float = _in("Training", 1.0)
    seed: int = _in("Training", 1337)
    eval_interval: int = _in("Evaluation", 250)
    eval_iters: int = _in("Evaluation", 200)
    eval_only: bool = _in("Evaluation", False)
    patience: int | None = _in("Evaluation", None)
    always_save_checkpoint: bool = _in("Evaluation", True)
    never_save_checkpoint: bool = _in("Evaluation", False)
    log_interval: int = _in("Logging", 10)
    report_to: str = _in("Logging", "none")
    progress: bool = _in("Logging", True)
    sample_each_eval: bool = _in("Logging", False)
    sample_start_tokens: str = _in("Logging", "\n")
    max_sample_tokens: int = _in("Logging", 200)
    sample_temperature: float = _in("Logging", 0.8)
    sample_top_k: int = _in("Logging", 200)
    device: str = _in("System", "auto")
    dtype: str = _in("System", "auto")
    compile: bool = _in("System", False)
    use_gradient_checkpointing: bool = _in("System", False)

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1, "gradient_accumulation_steps": 1, "max_iters": 1, "warmup_iters": 0, "lr_decay_iters": 1,
            "eval_interval": 1, "eval_iters": 1, "patience": 0, "log_interval": 1, "max_sample_tokens": 1,
            "sample_top_k": 0, "learning_rate": 0, "min_lr": 0, "weight_decay": 0, "grad_clip": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:  # NaN too
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        for name, choices in (("dtype", DTYPES), ("decay_rule", DECAY_RULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(choices)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.sample_temperature <= 0:
            raise ValueError(f"sample_temperature={self.sample_temperature} must be above 0.")
        if self.decay_lr and self.last_lr > self.learning_rate:
            raise ValueError(
                f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}. Lower it, or leave it out."
            )

    @property
    def last_lr(self) -> float:
        """The learning rate at which the cosine ends."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def decay_until(self) -> int:
        """The iteration at which the cosine ends."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    def learning_rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0: nanoGPT's warmup and cosine.

        Args:
            iteration (`int`): optimizer steps before it.
        """
        if iteration < self.warmup_iters:
            return self.learning_rate * (iteration + 1) / (self.warmup_iters + 1)
        if not self.decay_lr:
            return self.learning_rate
        if iteration >= self.decay_until:
            return self.last_lr
        share = (iteration - self.warmup_iters) / (self.decay_until - self.warmup_iters)
        return self.last_lr + 0.5 * (1 + math.cos(math.pi * share)) * (self.learning_rate - self.last_lr)

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the one it continues."""
        fixed = {name: value for name, value in asdict(self).items() if name not in self.free}
        return {**fixed, "lr_decay_iters": self.decay_until, "min_lr": self.last_lr}
