"""Schedules: pure functions of the step. Nothing here keeps state or reads a global generator.

Shapes: B samples, H query heads.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

DropoutUnit = Literal["sample", "layer", "head"]

_Value = TypeVar("_Value")
_EVERY_LAYER = -1


def piecewise(values: Sequence[_Value], step: int, total_steps: int) -> _Value:
    """Return the value in force at a step: each value holds for an equal share of the steps.

    Steps past the end keep the last value. Where the steps do not divide evenly, shares differ by
    at most one step.

    Raises:
        ValueError: no values, a negative step, or fewer than one step in total.
    """
    if not values:
        raise ValueError("expected at least one scheduled value, got none; give e.g. [0.9, 0.5]")
    if total_steps < 1:
        raise ValueError(f"expected total_steps of at least 1, got {total_steps}; raise it")
    if step < 0:
        raise ValueError(f"expected a step of at least 0, got {step}; steps count from 0")
    return values[min(step * len(values) // total_steps, len(values) - 1)]


def window_size(sizes: Sequence[int], step: int, total_steps: int) -> int:
    """Return the sliding window's size in tokens at a step (see `piecewise`).

    Raises:
        ValueError: a size below 1, or what `piecewise` refuses.
    """
    if any(size < 1 for size in sizes):
        raise ValueError(f"expected window sizes of at least 1 token, got {list(sizes)}; raise them")
    return piecewise(sizes, step, total_steps)


def window_dropout_probability(probabilities: Sequence[float], step: int, total_steps: int) -> float:
    """Return the probability at a step that the window branch is dropped (see `piecewise`).

    Raises:
        ValueError: a probability outside [0, 1], or what `piecewise` refuses.
    """
    for probability in probabilities:
        _check_probability(probability)
    return piecewise(probabilities, step, total_steps)


def draw_window_dropout(
    probability: float,
    *,
    batch_size: int,
    heads: int | None,
    per: DropoutUnit,
    seed: int,
    step: int,
    layer: int,
    first_sample: int = 0,
) -> Bool[Tensor, "B"] | Bool[Tensor, "B H"]:
    """Draw which windows are kept: True where a sample runs with its window branch.

    Each sample's draw depends only on (seed, step, its own index in the global batch, layer), so a
    batch split over workers or accumulation steps gives the same draws as the whole one, and no
    global generator is read or advanced.

    Args:
        probability: of dropping a window, in [0, 1]: a sample is kept with probability 1 - p.
        batch_size: B, the samples in this batch.
        heads: H, the query heads; read only by `per="head"`.
        per: `"sample"` shares one draw between all layers; `"layer"` draws anew for every layer;
            `"head"` for every layer and head.
        seed: the run's seed.
        step: the training step.
        layer: the layer's index; not read by `per="sample"`.
        first_sample: index in the global batch of this batch's first sample.

    Returns:
        A bool tensor on the CPU, [B], or [B, H] for `per="head"`.

    Raises:
        ValueError: an argument outside its range.
    """
    _check_probability(probability)
    if per not in ("sample", "layer", "head"):
        raise ValueError(f"expected per 'sample', 'layer' or 'head', got {per!r}; use one of them")
    if per == "head" and (heads is None or heads < 1):
        raise ValueError(f"expected the number of heads for per='head', got {heads}; pass heads")
    if batch_size < 0 or first_sample < 0:
        raise ValueError(
            f"expected batch_size and first_sample of at least 0, got {batch_size} and "
            f"{first_sample}; correct them"
        )
    columns = heads if per == "head" and heads is not None else 1
    stream = _EVERY_LAYER if per == "sample" else layer
    uniform = torch.empty(batch_size, columns, dtype=torch.float64)
    generator = torch.Generator()
    for row in range(batch_size):
        generator.manual_seed(_counter_seed(seed, step, first_sample + row, stream))
        uniform[row].uniform_(generator=generator)
    kept = uniform >= probability
    return kept if per == "head" else kept[:, 0]


def _counter_seed(*counters: int) -> int:
    """Hash counters to a seed. Neighbouring counters must not give related generator states."""
    packed = struct.pack(f"<{len(counters)}q", *counters)
    # 32 bits: what torch's CPU generator takes from a seed.
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little")


def _check_probability(probability: float) -> None:
    if not 0.0 <= probability <= 1.0:  # also refuses NaN
        raise ValueError(f"expected a probability in [0, 1], got {probability}; correct it")
