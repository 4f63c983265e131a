"""How the kernels cut up their work: a short list, every entry of it tested against the reference."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    """One way to cut up a call.

    Attributes:
        chunk: tokens between two stored states; a multiple of ``queries``.
        queries, keys: rows and columns of a block of scores.
        features: features a program holds at a time.
        values: columns of S that one program of the running sums holds.
        warps, stages: of every kernel; stages deeper than 2 are where Triton 3.6 is known to miscompile.
        maps: whether Hedgehog maps are computed inside the kernels; features are tensors elsewhere.
    """

    chunk: int
    queries: int
    keys: int
    features: int
    values: int
    warps: int
    maps: bool = False
    stages: int = 1

    def __post_init__(self) -> None:
        if self.chunk % self.queries:
            raise ValueError(f"expected chunk a multiple of queries, got {self.chunk} and {self.queries}.")


CONFIGS = (
    Config(chunk=256, queries=64, keys=64, features=64, values=64, warps=8, maps=True),
    Config(chunk=256, queries=64, keys=32, features=32, values=64, warps=4),
    Config(chunk=64, queries=16, keys=16, features=16, values=32, warps=4),
)
"""Not timed. Chosen by what the compiler for Hopper says of registers at head_dim 128 and 256 features: the
first two for 16-bit numbers, the last for float32, where larger blocks, and maps inside, spill by kilobytes a
thread."""

WIDE, NARROW = CONFIGS[1], CONFIGS[2]
"""For numbers of 16 bits, and for wider ones. The first of `CONFIGS` is for nobody: on an H200 its kernels
with maps inside ended in an illegal memory access in bfloat16 (docs/adr/0009-triton-kernels.md)."""

_chosen: ContextVar[Config | None] = ContextVar("equipoise_triton_config", default=None)


@contextmanager
def using(config: Config) -> Generator[None]:
    """Run the kernels of a block of code, and the backward passes of its calls, in one configuration."""
    token = _chosen.set(config)
    try:
        yield
    finally:
        _chosen.reset(token)


def config_for(dtype: torch.dtype) -> Config:
    """The configuration of a call: the one chosen by `using`, else the one for its numbers."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return WIDE if dtype.itemsize <= 2 else NARROW
