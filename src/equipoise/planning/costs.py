"""Time, wire and disk of a conversion on machines that are not here: operations and bytes over assumed rates.

Nothing here is measured. Peak rates are the makers' (dense bfloat16, without sparsity); the share of them
that training reaches, the wire and the disk are assumptions, stated beside the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.registry import unknown_name

HOUR = 3600.0


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        flops: operations a second at its peak, dense bfloat16.
        memory: bytes.
        link: bytes a second to its neighbours, one way.
    """

    flops: float
    memory: int
    link: float


ACCELERATORS = {
    "a100": Accelerator(312e12, 80 * 10**9, 300e9),
    "h100": Accelerator(989e12, 80 * 10**9, 450e9),
    "h200": Accelerator(989e12, 141 * 10**9, 450e9),
    "b200": Accelerator(2250e12, 180 * 10**9, 900e9),
}
"""NVIDIA's data sheets, SXM modules; the link is NVLink's."""
UTILISATION = 0.3
"""Share of the peak that training is assumed to reach."""
NODE, NODE_LINK = 8, 50e9
"""Ranks of a node; beyond one, bytes a second and rank between nodes (400 Gbit/s)."""
DISK = 3e9
"""Bytes a second of a local NVMe disk."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a conversion is to run.

    Attributes:
        ranks: processes, one device each.
        parallel: ddp, every rank has the whole donor; fsdp2, each has a shard of it.
        stream_layers: stage 1 with one layer in memory at a time.
        accelerator: name of the device; None for this machine.
        utilisation: share of its peak that training reaches.
    """

    ranks: int = 1
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    stream_layers: bool = False
    accelerator: str | None = None
    utilisation: float = UTILISATION

    def __post_init__(self) -> None:
        if self.accelerator is not None and self.accelerator not in ACCELERATORS:
            raise unknown_name("accelerator", self.accelerator, ACCELERATORS)


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One stage; seconds are None where no accelerator was named, or steps are not known.

    Attributes:
        flops: operations of a step, all ranks together.
        wire_bytes: a rank sends in a step.
        disk_bytes: read and written in the stage; 0 where nothing is streamed.
        compute_seconds, wire_seconds, disk_seconds: each as if it were alone.
        bottleneck: the longest of them.
        device_hours: of all ranks, where the others hide behind the longest.
    """

    flops: float
    wire_bytes: int
    disk_bytes: int
    compute_seconds: float | None = None
    wire_seconds: float | None = None
    disk_seconds: float | None = None
    bottleneck: Literal["compute", "wire", "disk"] | None = None
    device_hours: float | None = None


def priced(flops: float, wire_bytes: int, disk_bytes: int, steps: int | None, target: Target) -> StageCost:
    """Put rates under operations and bytes; arguments as in `StageCost`."""
    cost = StageCost(flops=flops, wire_bytes=wire_bytes, disk_bytes=disk_bytes)
    if target.accelerator is None or steps is None:
        return cost
    device = ACCELERATORS[target.accelerator]
    link = device.link if target.ranks <= NODE else NODE_LINK
    seconds = {
        "compute": steps * flops / (device.flops * target.utilisation * target.ranks),
        "wire": steps * wire_bytes / link,
        "disk": disk_bytes / (DISK * max(1, target.ranks // NODE)),
    }
    longest = max(seconds, key=lambda name: seconds[name])
    return StageCost(
        flops=flops, wire_bytes=wire_bytes, disk_bytes=disk_bytes, compute_seconds=seconds["compute"],
        wire_seconds=seconds["wire"], disk_seconds=seconds["disk"],
        bottleneck=longest,  # pyright: ignore[reportArgumentType]
        device_hours=target.ranks * seconds[longest] / HOUR,
    )  # fmt: skip


def gathered_bytes(donor: int, ranks: int, *, passes: int) -> int:
    """Bytes a rank receives of a sharded donor in ``passes`` passes over it."""
    return passes * donor * (ranks - 1) // ranks


def averaged_bytes(trainable: int, ranks: int) -> int:
    """Bytes a rank sends to average float32 gradients: a ring's reduce-scatter and all-gather."""
    return 2 * 4 * trainable * (ranks - 1) // ranks


def streamed_bytes(*, rows: int, length: int, hidden: int, layers: int, itemsize: int, passes: float) -> int:
    """Hidden states that streaming writes once and reads: to go on, and ``passes`` times to train."""
    once = rows * length * hidden * itemsize
    return round(once * layers * (2 + passes))
