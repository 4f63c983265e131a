"""Memory that was freed goes back to the system between stages."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Give freed memory back: glibc keeps what small tensors took, and the next stage comes on top."""
    gc.collect()
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return
