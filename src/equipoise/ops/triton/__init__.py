"""Kernels for accelerators, in Triton: imported by `equipoise.ops.dispatch` when a call can use them."""

from equipoise.ops.triton.calls import run, unsupported

__all__ = ["run", "unsupported"]
