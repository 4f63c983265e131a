"""The delta rule on flash-linear-attention's Triton kernels, for numbers of 16 bits on a GPU.

They round features, values, what a chunk takes in, and S where outputs read it to 16 bits; S that is carried
from chunk to chunk stays at 32. Our own chunks hold all at 32. Shapes follow the legend in
`equipoise.ops.types`; N heads of keys, each shared by h / N query heads.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MODULE = "fla.ops.delta_rule"
BLOCK, MOST = 16, 256
"""Features, and numbers of a value, are a multiple of the first and no more than the second."""
RELEASE = (0, 6)
"""The first that is used: what earlier ones compute on this path was not read."""


@cache
def fla_module(name: str) -> tuple[Any, str]:
    """A module of flash-linear-attention, or None and why there is none."""
    try:
        version = metadata.version("flash-linear-attention")
    except metadata.PackageNotFoundError:
        return None, 'flash-linear-attention is not installed: pip install "equipoise[gpu]"'
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < RELEASE:
        return None, f"flash-linear-attention is {version}, {'.'.join(map(str, RELEASE))} is needed"
    try:
        return importlib.import_module(name), ""
    except (ImportError, RuntimeError) as error:  # of another release of torch or Triton, say
        return None, f"flash-linear-attention cannot be imported: {error}"


def unsupported(device: torch.device, dtype: torch.dtype, features: int, value_size: int) -> str | None:
    """Why the kernels cannot run a call; None where they can.

    Args:
        device, dtype: of the call's q.
        features, value_size: F and E.
    """
    if device.type != "cuda":
        return f"the delta rule's kernels on {device.type}"
    if dtype.itemsize != 2:
        return f"the delta rule's kernels in {dtype}"
    if any(size % BLOCK or size > MOST for size in (features, value_size)):
        return f"the delta rule's kernels with {features} features and {value_size} numbers a value"
    _, reason = fla_module(MODULE)
    return f"the delta rule's kernels: {reason}" if reason else None


@dataclass(frozen=True)
class Rows:
    """What the rule is applied to.

    Attributes:
        queries: phi(q) [B, N, h / N, T, F].
        units: keys of length 1 [B, N, T, F].
        strength: how much of what S says of a key is replaced [B, N, T, 1].
        values: [B, N, T, E].
        segments: of every token [B, T], where rows are packed; padding belongs to the one before it.
    """

    queries: Tensor
    units: Tensor
    strength: Tensor
    values: Tensor
    segments: Tensor | None


def run(rows: Rows, sums: Tensor, last: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(output [B, N, h / N, T, E], S after the last segment [B, N, F, E]), in the dtype of S.

    Args:
        rows: the tokens.
        sums: S before, [B, N, F, E].
        last: the segment that S is of [B], where rows are packed.
        dtype: that products run in, of 16 bits.
    """
    shared = rows.queries.shape[2]
    q, k, v, beta = (
        x.transpose(1, 2).to(dtype)  # kernels have heads behind tokens
        for x in (
            rows.queries.flatten(1, 2),
            *(x.repeat_interleave(shared, 1) for x in (rows.units, rows.values, rows.strength)),
        )
    )
    chunk_delta_rule = fla_module(MODULE)[0].chunk_delta_rule
    before = sums.repeat_interleave(shared, 1).to(torch.float32)
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if rows.segments is None:
        out, after = chunk_delta_rule(q, k, v, beta[..., 0], initial_state=before, **options)
    else:
        assert last is not None
        bounds, first, ends = _sequences(rows.segments)
        goes_on = (rows.segments[:, 0] == last)[:, None, None, None]
        starts = before.new_zeros(len(bounds) - 1, *before.shape[1:])
        starts = starts.index_copy(0, first, before * goes_on)
        q, k, v, beta = (x.flatten(0, 1)[None] for x in (q, k, v, beta))
        out, after = chunk_delta_rule(
            q, k, v, beta[..., 0], initial_state=starts, cu_seqlens=bounds, **options
        )
        out, after = out[0].unflatten(0, rows.segments.shape), after[ends]
    out = out.transpose(1, 2).unflatten(1, (-1, shared))
    return out.to(sums.dtype), after[:, ::shared].to(sums.dtype)


def _sequences(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of the sequences, all rows behind one another [S + 1]; each row's first and last of them [B]."""
    begins = functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    bounds = functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=segments.numel())
    ends = begins.sum(1).cumsum(0)
    first = functional.pad(ends[:-1], (1, 0))
    return bounds, first, ends - 1
