"""The model card of a trained model: its own figures, and no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_gradtools import __version__
from hf_gradtools.hub import write_card
from hf_gradtools.nanogpt.configuration_nanogpt import NanoGPTConfig
from hf_gradtools.nanogpt.training.starting import config_fields


if TYPE_CHECKING:
    from hf_gradtools.nanogpt.training.trainer import BlockTrainer
    from hf_gradtools.nanogpt.training.workflow import TrainResult

__all__ = ["write_nanogpt_card"]

TEMPLATE = "nanogpt_card.md"
ALWAYS_SHOWN = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
NOT_SHOWN = {"dataset", "out_dir", "progress", "report_to", "overwrite_out_dir", "device", "eval_only"}


def write_nanogpt_card(folder: Path, trainer: BlockTrainer, result: TrainResult) -> ModelCard:
    """Writes `README.md` beside the model.

    Args:
        folder (`Path`): of the model.
        trainer (`BlockTrainer`): which trained it.
        result (`TrainResult`): what it came to.
    """
    name, dataset = folder.resolve().name, Path(trainer.options.dataset).name
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["nanogpt", "hf_gradtools"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type="loss",
                metric_name="validation loss (nats per token)",
                metric_value=result.best_val_loss,
            )
        ],
    )
    return write_card(
        folder,
        TEMPLATE,
        metadata,
        name=name,
        dataset=dataset,
        tokenizer=trainer.data.meta.get("tokenizer"),
        model_class=type(trainer.model).__name__,
        result=result,
        model=_model(trainer.model.config),
        options=_options(trainer),
        evaluations=_evaluations(trainer.state.log_history),
        versions={"hf_gradtools": __version__, "Transformers": transformers.__version__, "PyTorch": torch.__version__},
    )


def _model(config: Any) -> dict[str, Any]:
    """The sizes, and what differs from the defaults."""
    if not isinstance(config, NanoGPTConfig):
        return {"model_type": config.model_type}
    values = {name: getattr(config, name) for name in config_fields()}
    return {
        name: values[name]
        for name, field in config_fields().items()
        if name in ALWAYS_SHOWN or values[name] != field.default
    }


def _options(trainer: BlockTrainer) -> dict[str, Any]:
    """What differs from the defaults, and the few that one always asks for."""
    options = trainer.options
    always = {"batch_size", "max_iters", "learning_rate", "seed"}
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name in always or (getattr(options, field.name) != field.default and field.name not in NOT_SHOWN)
    }


def _evaluations(history: list[dict[str, float]], most: int = 12) -> list[tuple[int, float]]:
    """Iterations and losses, spread over the run, the last one among them."""
    rows = [(int(row["step"]), row["eval_loss"]) for row in history if "eval_loss" in row]
    step = -(-len(rows) // most)
    return rows[::-1][::step][::-1] if rows else rows
