"""What the tests of the Triton kernels compare, and how closely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def found(out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """A result and the gradients of what it came from, in float64 on the CPU; zeros where there is none."""
    grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return [x.detach().double().cpu() for x in (out, *grads)]


def assert_agree(
    names: Sequence[str], ours: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Every tensor within the type's tolerance of its largest entry, at least 1."""
    for name, one, other in zip(names, ours, expected, strict=True):
        tolerance = TOLERANCES[dtype] * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(
            one, other, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
