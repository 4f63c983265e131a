"""What a conversion holds in memory at its most, part by part.

Tensors are counted by `equipoise.planning.simulate`. What a process on a CPU has resident beyond them is two
constants, fitted on the calibration set of tools/plan_memory.py, none of whose runs is among those that the
prediction is held to: the libraries, and what glibc's heap loses to gaps between small tensors (large ones
are mapped one by one, and cost what they are). On an accelerator the figure is of tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from equipoise.config import RunConfig, Schedule
from equipoise.models.layout import attention_modules
from equipoise.planning.simulate import Footprint, Phase, footprint
from equipoise.planning.slices import Kind

LIBRARIES = 595_000_000
"""Bytes resident in a conversion of next to nothing: Python, torch (CPU), transformers, datasets, peft."""
GAPS = 1.5
"""What small tensors take of glibc's heap, over what they hold."""
TOKEN = 13
"""Bytes of a packed token in memory: the token, whether it is trained on, and the row under way."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts, and how many parameters they are.

    Attributes:
        parameters: of the donor.
        outside: those of them outside the decoder's layers: embeddings, head, last norm.
        layer: those of the largest layer.
        itemsize: bytes of one, in memory.
        stored: bytes of one, on disk.
    """

    parameters: int
    outside: int
    layer: int
    itemsize: int
    stored: int

    @property
    def total(self) -> int:
        """Bytes of the donor in memory."""
        return self.parameters * self.itemsize

    @property
    def on_disk(self) -> int:
        """Bytes of its files."""
        return self.parameters * self.stored

    def held(self, *, ranks: int = 1, layers: bool = False) -> int:
        """Bytes a process holds: all; its shard and what is gathered around it; or one layer."""
        if layers:
            return max(self.layer, self.outside) * self.itemsize
        if ranks == 1:
            return self.total
        # FSDP2 keeps the root gathered, the layer that runs, and the one that is on its way
        gathered = min(self.parameters, self.outside + 2 * self.layer)
        return -(-self.total // ranks) + gathered * self.itemsize


def weights_of(model: Any, dtype: torch.dtype, stored: torch.dtype) -> Weights:
    """Of a donor, which may be on meta."""
    attention = {id(module) for module in attention_modules(model)}
    layers: list[nn.Module] = [
        module
        for module in model.get_decoder().modules()
        if any(id(child) in attention for child in module.children())
    ]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    parameters = sum(p.numel() for p in model.parameters())
    return Weights(parameters, parameters - sum(sizes), max(sizes), dtype.itemsize, stored.itemsize)


@dataclass(frozen=True)
class Need:
    """What one part of a conversion needs beside the donor's weights.

    Attributes:
        name: of the part.
        held: bytes of mixers, adapters, gradients, optimiser state.
        tensors: of its micro batch.
    """

    name: str
    held: int
    tensors: Footprint


def resident(
    weights: Weights, needs: Sequence[Need], *, held: int, tokens: int, device: str
) -> dict[str, int]:
    """Bytes held at their most in each part of a conversion, in order.

    Args:
        weights: of the donor.
        needs: of each part.
        held: bytes of weights in this process.
        tokens: of training data that lie in memory.
        device: cpu, or the name of an accelerator.
    """
    if device != "cpu":
        return {need.name: round(held + need.held + need.tensors.peak_bytes) for need in needs}
    fixed = LIBRARIES + held + TOKEN * tokens
    parts: dict[str, int] = {}
    if weights.stored != weights.itemsize:  # files stay mapped until every tensor of another dtype is made
        shrink = held / weights.total
        parts["loading"] = round(fixed + weights.parameters * weights.stored * shrink)
    heap = 0.0
    for need in needs:
        heap = max(heap, GAPS * need.tensors.small_bytes)
        own = need.held + max(heap + need.tensors.large_bytes, need.tensors.peak_bytes)
        parts[need.name] = round(fixed + own)
        if need.name != "held-out rows":
            heap = 0.0  # given back after a stage
    return parts


def at_once(stage: Schedule, ranks: int = 1) -> int:
    """Rows of a stage that a process holds at once."""
    share = max(1, stage.batch_size // ranks)
    return min(stage.micro_batch_size or share, share)


def micro_batch(
    config: Any,
    run: RunConfig,
    phase: Phase,
    kinds: Sequence[Kind],
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
) -> Footprint:
    """`footprint`; rows longer than `LONGEST` are extrapolated from two shorter lengths, by a straight line
    (operations: by a parabola).

    Raises:
        NotSimulatedError: not possible for this model.
    """

    def at(tokens: int) -> Footprint:
        return footprint(config, run, phase, kinds, rows=rows, length=tokens, dtype=dtype)

    if length <= LONGEST:
        return at(length)
    long, half = at(LONGEST), at(LONGEST // 2)
    line = long + long.beyond(half).scaled((length - LONGEST) / (LONGEST - LONGEST // 2))
    # operations have a part in proportion to the length, and one to its square
    square = (long.flops - 2 * half.flops) / (LONGEST**2 / 2)
    return replace(line, flops=(long.flops / LONGEST - square * LONGEST) * length + square * length**2)


LONGEST = 4096
"""Tokens of a row that are simulated; the operators' memory is linear in it."""
