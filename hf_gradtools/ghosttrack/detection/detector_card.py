"""The model card of a hallucination detector: what was measured, and no other figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_gradtools import __version__
from hf_gradtools.hub import is_hub_id, write_card


if TYPE_CHECKING:
    from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector

__all__ = ["write_detector_card"]

TEMPLATE = "hallucination_detector_card.md"
TASK = "hallucination-detection"
NAME = "detector"  # of this detector in the tables
FEATURES = {
    "latents": "the largest activation of each feature",
    "tracks_seed": "26 numbers about the tracks of features through the layers",
    "tracks_enlarged": "numbers about the tracks of features through the layers, layer by layer",
    "latents+tracks": "the largest activation of each feature and numbers about the tracks of features",
}


def write_detector_card(
    folder: str | os.PathLike[str], detector: HallucinationDetector, repo_id: str | None = None
) -> ModelCard:
    """Writes `README.md` beside a detector.

    Args:
        folder (`str` or `os.PathLike`): of the detector.
        detector ([`HallucinationDetector`]): it.
        repo_id (`str`, *optional*): on the Hub; default the folder's name.
    """
    config = detector.config
    name = (repo_id or Path(folder).resolve().name).split("/")[-1]
    base = config.model_name if is_hub_id(config.model_name) else None
    rows = [row for row in config.metrics.get("table", []) if row["auroc"]["estimate"] is not None]
    own = next((row for row in rows if row["method"] == NAME), None)
    data = ModelCardData(
        library_name="hf_gradtools",
        pipeline_tag="text-classification",
        tags=[TASK, "hf_gradtools", "sparse-autoencoder"],
        base_model=base,
        **({} if own is None else {"model_name": name, "eval_results": [_result(own)]}),
    )
    return write_card(
        folder,
        TEMPLATE,
        data,
        name=name,
        repo_id=repo_id or name,
        model=f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(str(config.model_name)).name}`",
        config=config,
        features=FEATURES[config.features],
        widths={hookpoint: sae.config.d_sae for hookpoint, sae in detector.saes.items()},
        task=TASK,
        rows=rows,
        metrics=config.metrics,
        differences=config.metrics.get("differences", {}),
        versions={"hf_gradtools": __version__, "Transformers": transformers.__version__, "PyTorch": torch.__version__},
    )


def _result(row: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-classification",
        dataset_type="grouped-cross-validation",
        dataset_name=f"{row['rows']} texts of {row['groups']} questions",
        metric_type="roc_auc",
        metric_name="AUROC out of fold",
        metric_value=round(row["auroc"]["estimate"], 4),
    )
