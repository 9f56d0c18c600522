"""What importing the package registers with the stack, at no cost until the stack itself is imported.

`import hf_gradtools` loads neither torch nor PEFT. A finder on `sys.meta_path` waits for `peft`, and runs the
registration right after it; if PEFT is there already, it runs at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


AFTER = {"peft": "hf_gradtools.grit"}  # module of the stack: module of ours that registers itself when imported


def install() -> None:
    """Registers with what is imported already, and waits for the rest."""
    for theirs, ours in AFTER.items():
        if theirs in sys.modules:
            import_module(ours)
        else:
            sys.meta_path.insert(0, _After(theirs, ours))


class _After(MetaPathFinder, Loader):
    """Finds one module as Python would, and imports one of ours after it has run."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, ours
        self._loader: Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # as if we had never been there
        self._loader.exec_module(module)
        if self.ours not in sys.modules:  # else it is what imports PEFT, and registers at its end
            import_module(self.ours)
