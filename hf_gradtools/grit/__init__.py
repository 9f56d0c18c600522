"""GRIT: LoRA adapters steered by the Fisher information of their rank space. Importing it registers it with PEFT."""

from importlib import import_module
from typing import TYPE_CHECKING

from hf_gradtools.grit.config import GritConfig
from hf_gradtools.grit.export import export_lora
from hf_gradtools.grit.model import GritModel
from hf_gradtools.grit.register import register


if TYPE_CHECKING:
    from hf_gradtools.grit.callback import GritCallback
    from hf_gradtools.grit.controller import GritController
    from hf_gradtools.grit.plots import plot_heatmaps, plot_ranks, plot_spectra
    from hf_gradtools.grit.trainer import GritTrainer

_LAZY = {
    "GritCallback": "hf_gradtools.grit.callback",
    "GritController": "hf_gradtools.grit.controller",
    "GritTrainer": "hf_gradtools.grit.trainer",
    "plot_heatmaps": "hf_gradtools.grit.plots",
    "plot_ranks": "hf_gradtools.grit.plots",
    "plot_spectra": "hf_gradtools.grit.plots",
}

__all__ = [
    "GritCallback",
    "GritConfig",
    "GritController",
    "GritModel",
    "GritTrainer",
    "export_lora",
    "plot_heatmaps",
    "plot_ranks",
    "plot_spectra",
]

register("grit", GritConfig, GritModel)


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
