"""Ghost engines: which training samples help or hurt a validation set, told while a model trains; and projections of
every sample's gradient, stored, searched and selected from."""

from typing import TYPE_CHECKING

from hf_gradtools.core.lazy import lazy_names


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


__getattr__ = lazy_names(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
