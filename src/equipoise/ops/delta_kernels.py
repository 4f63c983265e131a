"""The delta rule on flash-linear-attention's Triton kernels, for numbers of 16 bits on a GPU.

They hold keys, values and what a chunk takes in at 16 bits, sums at 32; our own chunks hold all at 32. Shapes
follow the legend in `equipoise.ops.types`; N heads of keys, each shared by h / N query heads.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

LEAST, MOST = 16, 256
"""Features, and numbers of a value, that one block of the kernels can have."""


@cache
def _installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def unsupported(
    device: torch.device, dtype: torch.dtype, features: int, value_size: int, *, packed: bool
) -> str | None:
    """Why the kernels cannot run a call; None where they can.

    Args:
        device, dtype: of the call's q.
        features, value_size: F and E.
        packed: whether rows hold several sequences.
    """
    if device.type != "cuda":
        return f"the delta rule's kernels on {device.type}"
    if dtype.itemsize != 2:
        return f"the delta rule's kernels in {dtype}"
    if packed:
        return "the delta rule's kernels for packed rows"
    if not all(LEAST <= size <= MOST for size in (features, value_size)):
        return f"the delta rule's kernels with {features} features and {value_size} numbers a value"
    if not _installed():
        return 'the delta rule without flash-linear-attention: pip install "equipoise[gpu]"'
    return None


def run(
    queries: Tensor, units: Tensor, strength: Tensor, values: Tensor, sums: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(output [B, N, h / N, T, E], S [B, N, F, E] in float32).

    Args:
        queries: phi(q) [B, N, h / N, T, F].
        units: keys of length 1 [B, N, T, F].
        strength: how much of what S says of a key is replaced [B, N, T, 1].
        values: [B, N, T, E].
        sums: S before, in float32.
        dtype: that products run in.
    """
    chunk_delta_rule: Any = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    shared = queries.shape[2]
    q, k, v, beta = (
        x.transpose(1, 2).to(dtype)  # kernels have heads behind tokens
        for x in (
            queries.flatten(1, 2),
            units.repeat_interleave(shared, 1),
            values.repeat_interleave(shared, 1),
            strength.repeat_interleave(shared, 1),
        )
    )
    out, after = chunk_delta_rule(
        q, k, v, beta[..., 0], scale=1.0, initial_state=sums.repeat_interleave(shared, 1),
        output_final_state=True,
    )  # fmt: skip
    return out.transpose(1, 2).unflatten(1, (-1, shared)).to(sums.dtype), after[:, ::shared].to(sums.dtype)
