"""Kernels for accelerators, in Triton: imported by `equipoise.ops.dispatch` when a call can use them."""

from equipoise.ops.triton.calls import run, run_transfer, unsupported, unsupported_transfer

__all__ = ["run", "run_transfer", "unsupported", "unsupported_transfer"]
