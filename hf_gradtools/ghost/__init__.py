"""Ghost engines: which training samples help or hurt a validation set, told while a model trains; and projections of
every sample's gradient, stored, searched and selected from."""

from importlib import import_module
from typing import TYPE_CHECKING


_LAZY = {
    "GhostDotProd": "engine",
    "GhostDotProdCallback": "callback",
    "GhostDotProdConfig": "config",
    "GhostValues": "results",
    "GradProjCallback": "gradproj.callback",
    "GradProjConfig": "gradproj.config",
    "GradProjector": "gradproj.projector",
    "GradientEnsemble": "gradproj.ensemble",
    "GradientStore": "gradproj.store",
    "UncoveredGradientError": "coverage",
    "ghost_values": "results",
    "load_ghost_dataset": "loading",
    "select": "gradproj.selection",
}

__all__ = [
    "GhostDotProd",
    "GhostDotProdCallback",
    "GhostDotProdConfig",
    "GhostValues",
    "GradProjCallback",
    "GradProjConfig",
    "GradProjector",
    "GradientEnsemble",
    "GradientStore",
    "UncoveredGradientError",
    "ghost_values",
    "load_ghost_dataset",
    "select",
]

if TYPE_CHECKING:
    from .callback import GhostDotProdCallback
    from .config import GhostDotProdConfig
    from .coverage import UncoveredGradientError
    from .engine import GhostDotProd
    from .gradproj.callback import GradProjCallback
    from .gradproj.config import GradProjConfig
    from .gradproj.ensemble import GradientEnsemble
    from .gradproj.projector import GradProjector
    from .gradproj.selection import select
    from .gradproj.store import GradientStore
    from .loading import load_ghost_dataset
    from .results import GhostValues, ghost_values


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_LAZY)}")
    value: object = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
