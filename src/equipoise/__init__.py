"""equipoise: convert pretrained transformers into hybrids of window softmax and linear attention; audit both.

Names are imported on first use, so that ``import equipoise`` and ``equipoise --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from equipoise._register import register_with_transformers

if TYPE_CHECKING:
    from equipoise.config import HybridConfig, RunConfig
    from equipoise.layers.cache import HybridCache
    from equipoise.models.allocation import Allocation, allocate
    from equipoise.models.auto import merge_adapters, record_donor
    from equipoise.models.branches import BRANCH_STATES, branches, capture
    from equipoise.models.families import ConversionError
    from equipoise.models.layout import reach, state_bytes
    from equipoise.models.reading import PromptState, read_prompt
    from equipoise.models.states import describe_state, load_state, save_state
    from equipoise.models.surgery import hybridize, revert
    from equipoise.ops import AttentionState, Branches, hybrid_attention, linear_attention, window_attention

__version__ = "0.1.0"

_HOMES = {
    "config": ("HybridConfig", "RunConfig"),
    "layers.cache": ("HybridCache",),
    "models.allocation": ("Allocation", "allocate"),
    "models.auto": ("merge_adapters", "record_donor"),
    "models.branches": ("BRANCH_STATES", "branches", "capture"),
    "models.families": ("ConversionError",),
    "models.layout": ("reach", "state_bytes"),
    "models.reading": ("PromptState", "read_prompt"),
    "models.states": ("describe_state", "load_state", "save_state"),
    "models.surgery": ("hybridize", "revert"),
    "ops": ("AttentionState", "Branches", "hybrid_attention", "linear_attention", "window_attention"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BRANCH_STATES",
    "Allocation",
    "AttentionState",
    "Branches",
    "ConversionError",
    "HybridCache",
    "HybridConfig",
    "PromptState",
    "RunConfig",
    "allocate",
    "branches",
    "capture",
    "describe_state",
    "hybrid_attention",
    "hybridize",
    "linear_attention",
    "load_state",
    "merge_adapters",
    "reach",
    "read_prompt",
    "record_donor",
    "revert",
    "save_state",
    "state_bytes",
    "window_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(importlib.import_module(f"equipoise.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_with_transformers()
