"""How much memory a call takes beyond what it returns."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from equipoise.bench.setting import Call

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def measured(call: Call, device: str) -> tuple[object, int | None]:
    """(the call's result, peak bytes during the call beyond what was held before and its result).

    On Linux from the resident set's high-water mark, which is exact to a few pages, after memory that
    earlier calls freed was given back to the system: memory that is only reused would not show. None where
    the system keeps no such mark. On a GPU from torch's allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, max(0, torch.cuda.max_memory_allocated() - before - bytes_of(result))
    before = _reset()
    result = call()
    after = None if before is None else _status("VmHWM")
    if before is None or after is None:
        return result, None
    return result, max(0, after - before - bytes_of(result))


def bytes_of(result: object) -> int:
    """Bytes of all tensors in a result, each storage once."""
    leaves: Iterable[Any] = tree_leaves(result)
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in leaves
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


def _reset() -> int | None:
    """Start the high-water mark afresh; bytes resident now, None where that does not work."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc only
    except (OSError, AttributeError):
        return None
    try:
        CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(entry: str) -> int | None:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 if found else None
