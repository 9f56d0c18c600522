"""Options of a run on KV retrieval, by the seed's names. Imports nothing heavy: the command line shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


__all__ = ["MEMORY_FIELDS", "TrainOptions"]

BASE_MODELS = ("gpt2", "llama")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
SCHEDULES = (*CONSTANT_SCHEDULES, "linear", "cosine")
# Options that are fields of `GradMemConfig`: name here -> name there.
MEMORY_FIELDS = {
    "n_mem_tokens": "n_mem_tokens", "K": "K", "inner_lr": "inner_lr", "learn_inner_lr": "learn_inner_lr",
    "use_adam": "use_adam", "grad_mode": "grad_mode", "last_K_second_order": "last_k_second_order",
    "n_ctrl_tokens": "n_ctrl_tokens", "inner_clip_value": "inner_clip_value", "inner_clip_norm": "inner_clip_norm",
    "use_mem_proj": "use_mem_proj", "mem_proj_mode": "mem_proj_mode", "use_write_head": "use_write_head",
    "use_write_lora": "use_write_lora", "write_lora_r": "write_lora_r", "write_lora_alpha": "write_lora_alpha",
    "write_lora_dropout": "write_lora_dropout", "write_lora_target_modules": "write_lora_target_modules",
    "freeze_backbone": "freeze_backbone", "add_inner_loss_to_outer": "add_inner_loss_to_outer",
    "inner_loss_weight": "inner_loss_weight", "recompute_write": "recompute_write",
}  # fmt: skip


def _in(group: str, default: Any) -> Any:
    return field(default=default, metadata={"group": group})


@dataclass
class TrainOptions:
    """A run on key-value retrieval: a model that writes the context to its memory, or one that reads it as a prompt.

    A step is one of the outer optimizer, on `gradient_accumulation_steps` batches per process.

    Args:
        exp_path: folder of everything the run writes.
        vanilla: train the backbone alone, with the context in its prompt; options of the memory then have no effect.
        data_path: name of a task such as "N2-K1V1-V4" or "N10-K4V4-S4(32-64)", whose rows are generated as they are
            needed, or a folder made by `hf-gradtools gradmem data`.
        tokenizer_path: folder of a tokenizer; default that of the task's alphabet, or of pretrained_model.
        queries_per_context: queries answered from each written memory while training.
        max_context_length: tokens kept of each context.
        eval_rows: rows of validation, of a folder its first ones.
        base_model: "gpt2" or "llama", made anew with n_layer, n_head, n_embd; default "gpt2" without pretrained_model.
        pretrained_model: Hub id or folder of a causal LM, instead of base_model.
        init_checkpoint: folder of an earlier run's model whose weights the run starts with.
        n_layer: layers of a new backbone.
        n_head: attention heads of a new backbone.
        n_embd: width of a new backbone.
        max_position_embeddings: positions of a new backbone.
        attn_implementation: of the backbone, such as "eager" or "sdpa"; default the model's own choice.
        use_gradient_checkpointing: compute activations anew in the backward pass instead of keeping them.
        n_mem_tokens: vectors in the memory.
        K: gradient steps of a write.
        inner_lr: learning rate of these steps.
        learn_inner_lr: train it too.
        inner_lr_multiplier: its own learning rate is so many times learning_rate.
        use_adam: Adam instead of plain gradient descent in the write.
        grad_mode: what of the write is differentiated: "second" everything, "first" takes its gradients as constants,
            "none" nothing.
        last_K_second_order: differentiate only the last so many steps of the write.
        n_ctrl_tokens: learned tokens before and after the memory, in write and read.
        inner_clip_value: gradients of the memory are cut to plus or minus this.
        inner_clip_norm: and then to this norm per sample.
        use_mem_proj: the model sees a linear map of the memory, see mem_proj_mode.
        mem_proj_mode: "none", "proj", or "per_sample", which the write changes too.
        use_write_head: an output head of its own for the write.
        use_write_lora: LoRA in the backbone, active in the write only.
        write_lora_r: its rank.
        write_lora_alpha: its scale, times the rank.
        write_lora_dropout: its dropout.
        write_lora_target_modules: names of the modules that have it, separated by commas; default the linear maps.
        freeze_backbone: train the memory and its parts alone.
        add_inner_loss_to_outer: train the write's loss too.
        inner_loss_weight: its weight.
        recompute_write: compute the write's steps anew in the backward pass: memory of one step instead of K.
        per_device_batch_size: contexts in a batch.
        gradient_accumulation_steps: batches in a step.
        max_steps: steps of the run, all stages of a curriculum together.
        learning_rate: at its peak.
        lr_scheduler_type: "constant_with_warmup", "constant", "linear" or "cosine".
        warmup_steps: in which the learning rate rises linearly.
        final_lr_ratio: share of learning_rate at which "linear" and "cosine" end.
        weight_decay: of matrices, the memory among them.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        max_grad_norm: norm to which gradients are cut; 0 to leave them.
        seed: of the weights, the data and dropout.
        eval_steps: steps between evaluations, after each of which a checkpoint is written.
        eval_K: steps of a write in evaluation; default K.
        eval_generation: also answer by greedy generation in each evaluation.
        early_stopping_patience: stop after so many evaluations in a row that were no better than the best.
        stop_at: exact match at which the run ends; above 1 to never end so.
        curriculum_levels: numbers of pairs such as "2,4,8", each learned to curriculum_threshold before the next;
            default the one of data_path.
        curriculum_threshold: exact match that ends a stage of the curriculum.
        logging_steps: steps between entries of the log.
        report_to: where Trainer logs to, such as tensorboard.
        progress: show a progress bar.
        resume: continue the run in exp_path.
        bf16: compute in bfloat16; weights stay float32.
        device: "auto" or "cpu".

    Raises:
        ValueError: an option is out of range, or contradicts another.
    """

    # What a resumed run may change.
    free: ClassVar[tuple[str, ...]] = (
        "exp_path", "resume", "logging_steps", "report_to", "progress", "device", "stop_at", "early_stopping_patience",
        "attn_implementation", "use_gradient_checkpointing", "recompute_write",
    )  # fmt: skip

    exp_path: str = field(metadata={"group": "Data"})
    vanilla: bool = _in("Backbone", False)
    data_path: str = _in("Data", "N2-K4V4-S4(32-64)")
    tokenizer_path: str | None = _in("Data", None)
    queries_per_context: int = _in("Data", 1)
    max_context_length: int | None = _in("Data", None)
    eval_rows: int = _in("Evaluation", 1000)
    base_model: str | None = _in("Backbone", None)
    pretrained_model: str | None = _in("Backbone", None)
    init_checkpoint: str | None = _in("Backbone", None)
    n_layer: int = _in("Backbone", 4)
    n_head: int = _in("Backbone", 4)
    n_embd: int = _in("Backbone", 128)
    max_position_embeddings: int = _in("Backbone", 1024)
    attn_implementation: str | None = _in("Backbone", None)
    use_gradient_checkpointing: bool = _in("System", False)
    n_mem_tokens: int = _in("Memory", 8)
    K: int = _in("Memory", 1)
    inner_lr: float = _in("Memory", 0.04)
    learn_inner_lr: bool = _in("Memory", False)
    inner_lr_multiplier: float = _in("Training", 20.0)
    use_adam: bool = _in("Memory", False)
    grad_mode: str = _in("Memory", "second")
    last_K_second_order: int | None = _in("Memory", None)
    n_ctrl_tokens: int = _in("Memory", 0)
    inner_clip_value: float | None = _in("Memory", None)
    inner_clip_norm: float | None = _in("Memory", None)
    use_mem_proj: bool = _in("Memory", False)
    mem_proj_mode: str = _in("Memory", "none")
    use_write_head: bool = _in("Memory", False)
    use_write_lora: bool = _in("Memory", False)
    write_lora_r: int = _in("Memory", 8)
    write_lora_alpha: int = _in("Memory", 16)
    write_lora_dropout: float = _in("Memory", 0.0)
    write_lora_target_modules: str | None = _in("Memory", None)
    freeze_backbone: bool = _in("Memory", False)
    add_inner_loss_to_outer: bool = _in("Memory", False)
    inner_loss_weight: float = _in("Memory", 0.5)
    recompute_write: bool = _in("Memory", True)
    per_device_batch_size: int = _in("Training", 64)
    gradient_accumulation_steps: int = _in("Training", 1)
    max_steps: int = _in("Training", 50_000)
    learning_rate: float = _in("Training", 1e-4)
    lr_scheduler_type: str = _in("Training", "constant_with_warmup")
    warmup_steps: int = _in("Training", 1000)
    final_lr_ratio: float = _in("Training", 0.1)
    weight_decay: float = _in("Training", 0.0)
    adam_beta1: float = _in("Training", 0.9)
    adam_beta2: float = _in("Training", 0.999)
    max_grad_norm: float = _in("Training", 1.0)
    seed: int = _in("Training", 142)
    eval_steps: int = _in("Evaluation", 100)
    eval_K: int | None = _in("Evaluation", None)
    eval_generation: bool = _in("Evaluation", True)
    early_stopping_patience: int | None = _in("Evaluation", 50)
    stop_at: float = _in("Evaluation", 1.0)
    curriculum_levels: str | None = _in("Curriculum", None)
    curriculum_threshold: float = _in("Curriculum", 0.95)
    logging_steps: int = _in("Logging", 100)
    report_to: str = _in("Logging", "none")
    progress: bool = _in("Logging", True)
    resume: bool = _in("System", False)
    bf16: bool = _in("System", False)
    device: str = _in("System", "auto")

    def __post_init__(self) -> None:
        least = {
            "queries_per_context": 1, "max_context_length": 1, "eval_rows": 1, "n_layer": 1, "n_head": 1, "n_embd": 1,
            "max_position_embeddings": 1, "inner_lr_multiplier": 0, "per_device_batch_size": 1,
            "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 0, "warmup_steps": 0,
            "final_lr_ratio": 0, "weight_decay": 0, "max_grad_norm": 0, "eval_steps": 1, "eval_K": 0,
            "early_stopping_patience": 1, "curriculum_threshold": 0, "logging_steps": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= smallest:  # NaN too
                raise ValueError(f"{name}={value} must be at least {smallest}.")
        for name, choices in (("lr_scheduler_type", SCHEDULES), ("device", ("auto", "cpu"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Pass one of {', '.join(choices)}.")
        if self.base_model is not None and self.base_model not in BASE_MODELS:
            raise ValueError(f"base_model={self.base_model!r} is unknown. Pass one of {', '.join(BASE_MODELS)}.")
        if self.base_model is not None and self.pretrained_model is not None:
            raise ValueError(
                f"base_model={self.base_model!r}, pretrained_model={self.pretrained_model!r}: pass one of them."
            )
        if self.base_model is None and self.pretrained_model is None:
            self.base_model = BASE_MODELS[0]
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}.")
        _ = self.levels  # says now if they are no numbers

    @property
    def levels(self) -> list[int]:
        """Numbers of pairs of the curriculum's stages; none without a curriculum."""
        if not self.curriculum_levels:
            return []
        try:
            levels = [int(word) for word in self.curriculum_levels.split(",")]
        except ValueError as error:
            raise ValueError(f"curriculum_levels={self.curriculum_levels!r}: pass numbers, such as 2,4,8.") from error
        if min(levels) < 1 or len(set(levels)) < len(levels):
            raise ValueError(f"curriculum_levels={self.curriculum_levels!r} must be positive, and each given once.")
        return levels

    @property
    def memory(self) -> dict[str, Any]:
        """The fields of `GradMemConfig`."""
        fields = {theirs: getattr(self, ours) for ours, theirs in MEMORY_FIELDS.items()}
        if (targets := self.write_lora_target_modules) is not None:
            fields["write_lora_target_modules"] = [name.strip() for name in targets.split(",")]
        return fields

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the one it continues."""
        free = {*self.free, *(["max_steps"] if self.lr_scheduler_type in CONSTANT_SCHEDULES else [])}
        return {name: value for name, value in asdict(self).items() if name not in free}
