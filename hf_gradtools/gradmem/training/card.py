"""The model card of a trained model: its own figures, and no other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_gradtools import __version__
from hf_gradtools.gradmem.training.options import TrainOptions
from hf_gradtools.gradmem.training.progress import evaluations
from hf_gradtools.hub import is_hub_id, write_card


__all__ = ["write_gradmem_card"]

TEMPLATE = "gradmem_model.md"
ALWAYS_SHOWN = {"n_mem_tokens", "K", "inner_lr", "grad_mode", "per_device_batch_size", "learning_rate", "seed"}
NOT_SHOWN = {"exp_path", "progress", "report_to", "resume", "device", "data_path", "vanilla"}
PATHS = {"pretrained_model", "init_checkpoint", "tokenizer_path"}  # shown if they name something on the Hub


def write_gradmem_card(
    folder: Path, model: PreTrainedModel, result: dict[str, Any], history: list[dict[str, Any]]
) -> ModelCard:
    """Writes `README.md` beside the model.

    Args:
        folder (`Path`): of the model.
        model (`PreTrainedModel`): it.
        result (`dict`): what `train` returns.
        history (`list[dict]`): the run's log.
    """
    name, metrics = folder.resolve().name, result["metrics"]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gradmem", "hf_gradtools"],
        base_model=base if is_hub_id(base := result["options"]["pretrained_model"]) else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="kv-retrieval",
                dataset_name=f"KV retrieval {result['task']}",
                metric_type="exact_match",
                metric_name="exact match by greedy generation",
                metric_value=metrics["generated_exact_match"],
            )
        ],
    )
    return write_card(
        folder,
        TEMPLATE,
        metadata,
        name=name,
        result=result,
        metrics=metrics,
        model_class=type(model).__name__,
        inner_losses=[value for key, value in sorted(metrics.items()) if key.startswith("inner_loss_")],
        options=_options(result["options"]),
        evaluations=_spread(evaluations(history)),
        versions={"hf_gradtools": __version__, "Transformers": transformers.__version__, "PyTorch": torch.__version__},
    )


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, and the few that one always asks for."""
    return {
        field.name: given[field.name]
        for field in fields(TrainOptions)
        if field.name not in NOT_SHOWN
        and (field.name in ALWAYS_SHOWN or given[field.name] != field.default)
        and (field.name not in PATHS or is_hub_id(given[field.name]))
    }


def _spread(rows: list[dict[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """Some of the rows, spread over the run, the last one among them."""
    step = -(-len(rows) // most)
    return rows[::-1][::step][::-1] if rows else rows
