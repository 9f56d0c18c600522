"""Tiny runs, what they logged, and the learning rates they should have had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_gradtools.gradmem.training import TrainOptions


TASK = "N2-K1V1-V4"
TINY: dict[str, Any] = {
    "base_model": "llama", "data_path": TASK, "n_layer": 1, "n_head": 2, "n_embd": 16, "max_position_embeddings": 64,
    "n_mem_tokens": 2, "inner_lr": 1.0, "per_device_batch_size": 4, "max_steps": 6, "eval_steps": 2, "eval_rows": 8,
    "learning_rate": 1e-2, "warmup_steps": 2, "logging_steps": 1, "progress": False, "device": "cpu",
}  # fmt: skip
# GPT-2's dropout is on; two batches make a step; the log has fewer entries than there are steps.
KILLED = {
    "base_model": "gpt2", "gradient_accumulation_steps": 2, "queries_per_context": 2, "learn_inner_lr": True,
    "max_steps": 24, "eval_steps": 3, "logging_steps": 4, "K": 2, "curriculum_levels": "2,3",
    "curriculum_threshold": 0.1, "lr_scheduler_type": "linear",
}  # fmt: skip


def options(folder: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{**TINY, "exp_path": str(folder), **changes})


def words(folder: Path, **changes: Any) -> list[str]:
    """The same as a command line."""
    return [f"--{name}={value}" for name, value in {**TINY, "exp_path": folder, **changes}.items()]


def history(folder: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in timed)}
        for row in rows
        if "train_loss" not in row
    ]


def column(folder: Path, name: str) -> list[Any]:
    return [row[name] for row in history(folder) if name in row]
