"""Make ``AutoModelForCausalLM`` know equipoise's classes, without importing transformers before its time."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

_TRIGGER = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Register now if transformers' Auto classes are loaded, else as soon as they are."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from equipoise.models.auto import register_all

    register_all()


class _Finder(importlib.abc.MetaPathFinder):
    """Steps in once, at the import of the Auto classes, and lets the ordinary finders do the finding."""

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec
