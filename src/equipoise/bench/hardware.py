"""What the machine is, and how busy: a figure means nothing without them."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

BF16_FLAGS = ("amx_bf16", "avx512_bf16")
BUSY = 0.7
"""Load average a core above which wall times are marked as taken on a busy machine, beside the benchmark's
own thread."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine as far as speed depends on it.

    Attributes:
        name: of the processor or accelerator.
        cores: processors this process may use.
        memory_gib: main memory (the accelerator's own where there is one).
        bfloat16: what the processor has for bfloat16, in words.
        torch, python: versions.
    """

    name: str
    cores: int
    memory_gib: float
    bfloat16: str
    torch: str
    python: str

    @property
    def slug(self) -> str:
        """The name for file names."""
        words = re.sub(r"\([^)]*\)", "", self.name.lower())
        return "-".join(re.findall(r"[a-z0-9]+", words)) or "unknown"


def describe(device: str) -> Hardware:
    """The machine this process runs on."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Hardware(
            name=properties.name, cores=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1), bfloat16="tensor cores", **versions,
        )  # fmt: skip
    info = _cpu_info()
    return Hardware(
        name=_cpu_name(info), cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        memory_gib=round(_memory("MemTotal") / 2**30, 1), bfloat16=_bfloat16(info.get("flags", "")),
        **versions,
    )  # fmt: skip


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_name(info: dict[str, str]) -> str:
    name = info.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= info.keys() and not re.search(r"\d{3}", name):
        name += f" family {info['cpu family']} model {info['model']}"  # clouds hide which one it is
    return name


def _bfloat16(flags: str) -> str:
    has = [flag for flag in BF16_FLAGS if flag in flags.split()]
    lacks = [flag for flag in BF16_FLAGS if flag not in flags.split()]
    return ", ".join([*has, *(f"no {flag}" for flag in lacks)])


def _memory(entry: str) -> int:
    """Bytes of an entry of /proc/meminfo, 0 where there is none."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(rf"^{entry}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken, None where unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _memory("MemAvailable") or None


def load() -> float:
    """Processes that wanted to run over the last minute; NaN where unknown."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return float("nan")


def is_busy(average: float, hardware: Hardware, threads: int) -> bool:
    """Whether others than the benchmark kept the machine from it."""
    return average > max(threads, 1) + BUSY * max(hardware.cores - threads, 0)
