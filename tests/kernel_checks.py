"""What the tests of the Triton kernels run and compare, and how closely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.ops import AttentionState

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}


RULES: tuple[dict[str, Any], ...] = (
    {"mixing": "convex"},
    {"mixing": "shared", "overlap": False, "packed": True, "maps": 1, "softcap": 3.0},
    {"mixing": "calibrated", "packed": True, "maps": 1},
)
"""A setting of each mixing rule, the second with everything else in it too."""


def lengths_and_mixings() -> list[Any]:
    """Every mixing rule, with overlap and without, at odd lengths: padded, packed, or neither."""
    return [
        pytest.param(
            length,
            {
                "mixing": mixing, "overlap": overlap, "packed": length == 130, "maps": 1 + overlap,
                "padding": "holes" if length == 63 else "none",
            },
            id=f"{mixing}-{'overlap' if overlap else 'disjoint'}-{length}",
        )
        for mixing in ("convex", "shared", "calibrated")
        for overlap in (True, False) for length in (1, 63, 130)
        if overlap or mixing != "calibrated"
    ]  # fmt: skip


def by_sizes(config: Any) -> str:
    """Name of a configuration of the kernels in a test's."""
    return f"{config.chunk}-{config.keys}-{config.warps}"


def assert_same_end(
    ours: tuple[Tensor, AttentionState], general: tuple[Tensor, AttentionState], dtype: torch.dtype
) -> None:
    """Output and state of two ways through a sequence."""
    ends = [(out, *state.tensors()) for out, state in (ours, general)]
    assert len(ends[0]) == len(ends[1])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


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
