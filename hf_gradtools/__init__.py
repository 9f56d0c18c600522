"""Per-sample gradient information during ordinary Hugging Face training.

Public names load on first use: `import hf_gradtools` itself imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

_LAZY = {
    "GhostDotProd": "hf_gradtools.ghost",
    "GhostDotProdCallback": "hf_gradtools.ghost",
    "GhostDotProdConfig": "hf_gradtools.ghost",
    "ghost_values": "hf_gradtools.ghost",
    "load_ghost_dataset": "hf_gradtools.ghost",
}

__all__ = [
    "GhostDotProd",
    "GhostDotProdCallback",
    "GhostDotProdConfig",
    "__version__",
    "ghost_values",
    "load_ghost_dataset",
]

if TYPE_CHECKING:
    from hf_gradtools.ghost import (
        GhostDotProd,
        GhostDotProdCallback,
        GhostDotProdConfig,
        ghost_values,
        load_ghost_dataset,
    )


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_gradtools' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    value: object = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
