"""Changes modules right after they were imported, before whoever asked for them sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Change = Callable[[ModuleType], None]


def after_import(name: str, change: Change) -> None:
    """Has a module changed as soon as it is there. One that is imported already stays as it is."""
    if name in sys.modules:
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) and finder.name == name:
            finder.changes.append(change)
            return
    sys.meta_path.insert(0, _Finder(name, change))


class _Finder(MetaPathFinder):
    """Finds one module as Python does."""

    def __init__(self, name: str, change: Change) -> None:
        self.name = name
        self.changes = [change]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            for change in self.changes:
                change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
