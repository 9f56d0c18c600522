"""The model card of a GRIT adapter: what was measured, and nothing else. What is not known is left out."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers.modelcard import extract_hyperparameters_from_trainer

from hf_gradtools import __version__
from hf_gradtools.core.distributed import rank
from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.controller import GritController
from hf_gradtools.grit.report import read_report
from hf_gradtools.hub import is_hub_id, write_card


if TYPE_CHECKING:
    from transformers import Trainer

TEMPLATE = "grit_card.md"
TAGS = ("peft", "grit", "lora")
# What loads the base model, and where such a model stands on the Hub, by PEFT's task type.
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
COLUMNS = {
    "rank": "rank",
    "base_rank": "base rank",
    "k_a": "k_a",
    "k_b": "k_b",
    "effective_rank_a": "effective rank Σ_a",
    "effective_rank_g": "effective rank Σ_g",
    "top_eigenvalue_a": "top eigenvalue Σ_a",
    "top_eigenvalue_g": "top eigenvalue Σ_g",
}
MISSING = "–"
MAX_TARGETS = 12


def write_grit_card(
    folder: str | os.PathLike[str],
    source: GritController | dict[str, Any] | str | os.PathLike[str],
    trainer: Trainer | None = None,
    *,
    config: GritConfig | None = None,
    model_name: str | None = None,
    tags: list[str] | None = None,
    base_model: str | None = None,
    **metadata: Any,
) -> ModelCard | None:
    """Writes `README.md` beside an adapter.

    Args:
        folder: of the adapter.
        source: the controller that trained it; or what `rank_report` returns, or the path of `grit_ranks.json`.
        trainer: adds figures and options of its training.
        config: of the adapter; default the controller's, or what `adapter_config.json` in `folder` holds.
        model_name: the repository on the Hub, such as `"user/adapter"`, or a title alone; default what the trainer
            pushes to, or the name of the folder.
        tags: more of them.
        base_model: default the config's.
        **metadata: of [`~huggingface_hub.ModelCardData`], such as `license`, `language` and `datasets`.

    Returns:
        the card, so that `write_grit_card(...).push_to_hub("user/adapter")` sends it alone; `None` in processes
        other than the first, which write nothing.

    Raises:
        ValueError: `source` is no report of ranks.
    """
    if not (rank() == 0 if trainer is None else trainer.is_world_process_zero()):
        return None
    controller = source if isinstance(source, GritController) else None
    report = read_report(source)
    config = config or (controller.config if controller else _saved_config(Path(folder)))
    base = base_model or (config.base_model_name_or_path if config else None)
    hub_id = getattr(trainer, "hub_model_id", None) or (trainer.args.hub_model_id if trainer else None)
    title = model_name or hub_id or Path(folder).absolute().name
    model_id = title if "/" in title else hub_id or title
    columns = [key for key in COLUMNS if any(key in row for row in report["layers"].values())]
    return write_card(
        folder,
        TEMPLATE,
        _card_data(config, base, [*_as_list(tags), *_model_tags(controller)], metadata),
        title=title.split("/")[-1],
        model_id=model_id,
        base=_base_text(base),
        code=_loading_code(config, base, model_id),
        summary=_summary(report),
        sizes=_sizes(report),
        layer_columns=["layer", *(COLUMNS[key] for key in columns)],
        layer_rows=[
            [f"`{name}`", *(_number(row.get(key)) for key in columns)] for name, row in report["layers"].items()
        ],
        layer_legend=_legend(report, columns),
        settings=_settings(config) if config else [],
        training=_training(report, trainer),
        hyperparameters=_hyperparameters(trainer) if trainer else [],
        datasets_used=[f"`{name}`" for name in _as_list(metadata.get("datasets"))],
        versions=_versions() if controller or trainer else [],  # of a report's training they are not known
    )


def _saved_config(folder: Path) -> GritConfig | None:
    if not (folder / CONFIG_NAME).is_file():
        return None
    config = PeftConfig.from_pretrained(str(folder))
    return config if isinstance(config, GritConfig) else None


# ---- metadata and loading


def _card_data(
    config: GritConfig | None, base: str | None, tags: list[str], metadata: dict[str, Any]
) -> ModelCardData:
    every = [*TAGS, *tags]
    if is_hub_id(base):
        every.append(f"base_model:adapter:{base}")
    data = {
        "library_name": "peft",
        "pipeline_tag": _task(config)[1],
        "base_model": base if is_hub_id(base) else None,
        **{name: value for name, value in metadata.items() if value is not None},
    }
    return ModelCardData(tags=list(dict.fromkeys(every)), **data)


def _model_tags(controller: GritController | None) -> list[str]:
    """What trainers such as TRL's have noted on the model."""
    return [] if controller is None else _as_list(getattr(controller.tuner.model, "model_tags", None))


def _task(config: GritConfig | None) -> tuple[str | None, str | None]:
    kind = getattr(config, "task_type", None)
    return TASKS.get(str(getattr(kind, "value", kind)), (None, None))


def _base_text(base: str | None) -> str | None:
    if not base:
        return None
    return f"[`{base}`](https://huggingface.co/{base})" if is_hub_id(base) else f"`{Path(base).name}`"


def _loading_code(config: GritConfig | None, base: str | None, model_id: str) -> str:
    """What loads the adapter; the base model is left to the reader where its class or name is not known."""
    imports, auto = "import hf_gradtools\nfrom peft import PeftModel\n", _task(config)[0]
    if auto is None:
        return f'{imports}\nmodel = PeftModel.from_pretrained(base, "{model_id}")  # base: the model it was trained on'
    origin = base if is_hub_id(base) else "path/to/base-model"
    return (
        f"{imports}from transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{origin}")\n'
        f'model = PeftModel.from_pretrained(base, "{model_id}")'
    )


# ---- figures


def _summary(report: dict[str, Any]) -> str:
    ranks = [row["rank"] for row in report["layers"].values()]
    cut = sum(row["rank"] < row["base_rank"] for row in report["layers"].values())
    if not cut:
        return f"All {len(ranks)} layers kept the rank that they were created with."
    spread = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    return (
        f"Training cut {cut} of {len(ranks)} layers, which are now of rank {spread}: "
        f"{100 * report['reduction']:.1f} % fewer parameters than it started with."
    )


def _sizes(report: dict[str, Any]) -> list[list[str]]:
    rows = report["layers"].values()
    mean_base, mean = (sum(row[key] for row in rows) / len(rows) for key in ("base_rank", "rank"))
    return [
        ["adapter parameters", _number(report["base_parameters"]), _number(report["parameters"])],
        ["mean rank", _number(mean_base), _number(mean)],
    ]


def _legend(report: dict[str, Any], columns: list[str]) -> str | None:
    if "k_a" not in columns:
        return None
    share = f"{100 * report['threshold']:g} %" if "threshold" in report else "the threshold"
    return (
        "Σ_a and Σ_g are the second moments of the rank space's activations and gradients; `k_a` and `k_b` are the "
        f"least ranks that hold {share} of their spectra, and effective rank is the exponential of a spectrum's "
        "entropy."
    )


def _settings(config: GritConfig) -> list[tuple[str, str]]:
    """The options that were in force."""
    names = ["r", "lora_alpha", "target_modules", "preconditioner"]
    names += [name for name in ("use_rslora", "use_dora") if getattr(config, name)]
    if not config.is_passive:
        names += ["statistics", *(["ema_decay"] if config.statistics == "ema" else []), "grit_cov_update_freq"]
        names += ["kfac_min_samples"]
    if config.preconditioner:
        names += ["kfac_damping", "kfac_update_freq", "ng_warmup_steps"]
    if config.preconditioner in ("kfac", "grit"):
        names += ["kfac_exponent", "grafting"]
    names.append("reprojection")
    if config.reprojection:
        names += ["reprojection_freq", "reprojection_warmup_steps", "rank_change", "enable_rank_adaptation"]
        adapting = ["rank_adaptation_threshold", "rank_allocation", "min_lora_rank", "rank_adaptation_start_step"]
        names += adapting if config.enable_rank_adaptation else ["reprojection_k"]
    names += [name for name in ("lambda_kfac", "lambda_reproj") if getattr(config, name)]
    if config.lambda_kfac or config.lambda_reproj:
        names.append("regularizer_warmup_steps")
    if config.adaptive_schedule:
        names.append("adaptive_schedule")
    values = {name: getattr(config, name) for name in names}
    if "min_lora_rank" in values:
        values["min_lora_rank"] = config.least_rank
    targets = values["target_modules"]
    if isinstance(targets, set) and len(targets) > MAX_TARGETS:  # "all-linear" becomes the name of every layer
        ends = sorted({name.rsplit(".", 1)[-1] for name in targets})
        values["target_modules"] = f"{len(targets)} layers: {', '.join(ends)}"
    return [(name, _option(value)) for name, value in values.items()]


def _training(report: dict[str, Any], trainer: Trainer | None) -> list[tuple[str, str]]:
    """Of a run that has begun; an evaluation before it counts, if the trainer's history has it."""
    figures: list[tuple[str, Any]] = [("optimizer steps", report.get("steps"))]
    if trainer is not None and trainer.state.global_step:
        state, history = trainer.state, trainer.state.log_history
        figures = [("optimizer steps", state.global_step), ("epochs", state.epoch)]
        losses = [row for row in history if "loss" in row]
        if losses:
            figures.append((f"training loss at step {losses[-1]['step']}", losses[-1]["loss"]))
        figures += [("mean training loss", row["train_loss"]) for row in history if "train_loss" in row][-1:]
        for name in dict.fromkeys(name for row in history for name in row if re.fullmatch(r"eval_(.+_)?loss", name)):
            rows = [row for row in history if name in row]
            ends = rows[:1] if rows[0]["step"] == rows[-1]["step"] else [rows[0], rows[-1]]
            figures += [(f"{name.replace('_', ' ')} at step {row['step']}", row[name]) for row in ends]
    return [(name, _number(value)) for name, value in figures if value is not None]


def _hyperparameters(trainer: Trainer) -> list[tuple[str, str]]:
    return [(name, _option(value)) for name, value in extract_hyperparameters_from_trainer(trainer).items()]


def _versions() -> list[tuple[str, str]]:
    names = {"hf_gradtools": __version__, "Transformers": transformers.__version__, "PyTorch": torch.__version__}
    return [("PEFT", peft.__version__), *names.items()]


# ---- text


def _number(value: Any) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _option(value: Any) -> str:
    """As code; a bar would end the table's cell."""
    value = sorted(value) if isinstance(value, set) else value
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(getattr(value, "value", value))
    escaped = " ".join(text.replace("|", "\\|").split())
    return f"`{escaped}`"


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
