"""What importing the package registers with the stack, at no cost until the stack itself is imported.

`import hf_gradtools` loads neither torch nor PEFT. A finder on `sys.meta_path` waits for `peft`, and runs the
registration right after it; if PEFT is there already, it runs at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


AFTER = {"peft": "hf_gradtools.grit"}  # module of the stack: module of ours that registers itself when imported


def install() -> None:
    """Registers with what is imported already, and waits for the rest."""
    for theirs, ours in AFTER.items():
        if theirs in sys.modules:
            import_module(ours)
        else:
            sys.meta_path.insert(0, _Finder(theirs, ours))


class _Finder(MetaPathFinder):
    """Finds one module as Python would, with a loader that imports one of ours afterwards."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(self, spec.loader)  # loaded or not: some only ask whether it is installed
                return spec
        return None


class _Loader(Loader):
    def __init__(self, finder: _Finder, loader: Loader):
        self.finder, self.loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self.finder)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if we had never been there
        self.loader.exec_module(module)
        if self.finder.ours not in sys.modules:  # else it is what imports PEFT, and registers at its end
            import_module(self.finder.ours)
