"""Options of `hf-gradtools ghost train`. Imports nothing heavy, so that the command line can show them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


DTYPES = (None, "auto", "float32", "bfloat16", "float16")


@dataclass
class GhostTrainConfig:
    """A causal LM, what it is trained on, and how its training samples are scored.

    Args:
        model: Hub id or folder.
        dataset: training rows: a Hub id (`id` or `id:config`), a `.jsonl`, `.json`, `.csv`, `.parquet` or `.txt` file,
            or a folder made by `save_to_disk`.
        output_dir: folder of everything the run writes.
        split: split of `dataset`, default "train".
        val: validation rows: a dataset as above, a number of training rows to hold out or their share; or several
            such by name.
        val_split: split of validation datasets, default "train".
        text_column: column to train on; default by the usual names, as for the next two.
        prompt_column: column, or several separated by commas, that the model is given.
        response_column: column that it learns to answer.
        max_length: tokens kept of a row.
        lora: train adapters on all linear layers, or else all weights.
        lora_rank: rank of the adapters.
        epochs: passes over the training rows.
        max_steps: optimizer steps, overriding `epochs` unless -1.
        batch_size: rows in one forward on each device.
        gradient_accumulation_steps: forwards in one optimizer step.
        learning_rate: default 2e-4 for adapters, 2e-5 for all weights.
        seed: of adapters, data order, and the rows held out.
        dtype: of the weights; default the checkpoint's for adapters, float32 for all weights.
        bf16: compute in bfloat16.
        save_steps: optimizer steps between checkpoints.
        report_to: where Trainer logs to, such as "tensorboard".
        resume: continue the run in `output_dir` from its last checkpoint.
        val_batch_size, every_steps, layers, method, optimizer_aware, second_order, per_layer, grad_norms,
            sample_losses: see :class:`~hf_gradtools.GhostDotProdConfig`.

    Raises:
        ValueError: a number is out of range.
    """

    model: str
    dataset: str
    output_dir: str
    split: str | None = None
    val: str | Mapping[str, str] = "0.1"
    val_split: str | None = None
    text_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    max_length: int = 512
    lora: bool = True
    lora_rank: int = 16
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    seed: int = 0
    dtype: str | None = None
    bf16: bool = False
    save_steps: int = 500
    report_to: str = "none"
    resume: bool = False
    val_batch_size: int = 16
    every_steps: int = 1
    layers: list[str] | None = None
    method: str = "auto"
    optimizer_aware: bool = False
    second_order: bool = False
    per_layer: bool = False
    grad_norms: bool = False
    sample_losses: bool = False

    def __post_init__(self) -> None:
        least = {
            "max_length": 2,
            "lora_rank": 1,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "save_steps": 1,
            "val_batch_size": 1,
            "every_steps": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {smallest}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown. Pass one of {', '.join(filter(None, DTYPES))}.")
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"epochs={self.epochs:g} trains nothing. Pass a positive number, or max_steps=.")

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run must share with the one it continues."""
        free = {"output_dir", "epochs", "max_steps", "save_steps", "report_to", "resume"}
        return {name: value for name, value in asdict(self).items() if name not in free}
