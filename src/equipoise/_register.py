"""Make transformers' Auto classes know equipoise's models, without importing anything before its time."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

PREFIX = "equipoise_"
"""Of every converted model's type: `equipoise_llama` and so on."""
_TRIGGER = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Put families into transformers' table of configurations if it is loaded, else as soon as it is.

    No class is made and no model's code is imported here: `import equipoise` may stand anywhere, and the
    table may be loaded halfway through a model's import (`from transformers import LlamaForCausalLM`).
    """
    loaded = sys.modules.get(_TRIGGER)
    if loaded is not None and hasattr(loaded, "CONFIG_MAPPING"):
        _put_families_into(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class Families(dict[str, Any]):
    """What was registered with transformers besides its own, by model type; ours are made when asked for."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) and isinstance(key, str) and key.startswith(PREFIX):
            _make(key.removeprefix(PREFIX))
        return super().__contains__(key)


def _make(donor_type: str) -> None:
    from equipoise.models.auto import classes_of
    from equipoise.models.families import SUPPORTED

    if donor_type in SUPPORTED:
        classes_of(donor_type)


def _put_families_into(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, Families):
        mapping._extra_content = Families(mapping._extra_content)


class _Finder(importlib.abc.MetaPathFinder):
    """Steps in once, at the import of the table, and lets the ordinary finders do the finding."""

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
            _put_families_into(module)

        spec.loader.exec_module = exec_module
        return spec
