"""Training on several ranks: each its share of a step's rows, gradients averaged once a step.

A recipe's ``batch_size`` is that of all ranks together, and a step sees the same rows however many there are.
What trains (mixers, adapters) is whole on every rank; the donor is too (``ddp``) or is sharded (``fsdp2``,
see `equipoise.models.sharding`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from equipoise.config import ConfigError, RunConfig, Schedule
from equipoise.distributed import broadcast, gathered, is_launched, launched, ranks
from equipoise.registry import unknown_name

Parallel = Literal["auto", "ddp", "fsdp2"]
"""How ranks share a run: by data alone, with a sharded donor too, or as the launcher was configured."""
PARALLEL: tuple[Parallel, ...] = get_args(Parallel)

_configured: set[str] = set()
"""What accelerate was configured for when this process started."""
_FSDP, _DEEPSPEED, _MEGATRON = (f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"))


def chosen_parallel(wanted: str) -> Literal["none", "ddp", "fsdp2"]:
    """What a run does with its ranks; also keeps accelerate from doing it a second time.

    ``auto`` is data parallel, or FSDP2 where `accelerate launch` was configured for it; nothing with one
    process.

    Raises:
        UnknownNameError: no such way.
        ConfigError: asked for without a launcher, or accelerate is configured for something else.
    """
    if wanted not in PARALLEL:
        raise unknown_name("value for --parallel", wanted, PARALLEL)
    for variable in (_DEEPSPEED, _MEGATRON):
        if _is_set(variable):
            raise ConfigError(
                f"accelerate is configured for {variable.removeprefix('ACCELERATE_USE_')}, which conversions "
                "do not run on: launch with torchrun, or configure accelerate for plain multi-GPU or FSDP."
            )
    if wanted != "auto" and not is_launched():
        raise ConfigError(
            f"--parallel {wanted}: expected several processes, got this one alone. Start them with `torchrun "
            "--nproc-per-node 2 -m equipoise convert …` (`accelerate launch --cpu --num_processes 2` starts "
            "one)."
        )
    if _is_set(_FSDP):
        # Accelerate would wrap the model a second time; on CPU it would quietly do without FSDP.
        del os.environ[_FSDP]
        _configured.add(_FSDP)
    if not is_launched() or (launched().count == 1 and wanted == "auto"):
        return "none"
    if wanted == "auto":
        return "fsdp2" if _FSDP in _configured else "ddp"
    # one rank's shard would be the whole donor, and FSDP2 does not run so
    return "fsdp2" if wanted == "fsdp2" and launched().count > 1 else "ddp"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def check_batches(run: RunConfig) -> None:
    """Make sure that both stages' batches divide among the ranks, before anything is read.

    Raises:
        ConfigError: one does not; says what to change.
    """
    for name, stage in (("transfer", run.transfer), ("finetune", run.finetune)):
        if stage is not None:
            share_of_batch(stage, name)


def share_of_batch(stage: Schedule, name: str) -> tuple[int, int]:
    """(rows in memory at once, how often a step) of each rank: their product times the ranks is the batch.

    Raises:
        ConfigError: the batch does not divide so.
    """
    count = ranks().count
    if stage.batch_size % count:
        below, above = stage.batch_size // count * count, -(-stage.batch_size // count) * count
        choice = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"{name}.batch_size: expected a multiple of the {count} processes, which share a step's rows, "
            f"got {stage.batch_size}. Set it to {choice}, or start another number of processes."
        )
    share = stage.batch_size // count
    micro = min(stage.micro_batch_size or share, share)
    if share % micro:
        raise ConfigError(
            f"{name}.micro_batch_size: expected a divisor of {share}, each of {count} processes' share of "
            f"batch_size {stage.batch_size}, got {micro}. Set it to one, or leave it out."
        )
    return micro, share // micro


# ---- what trains


def share_weights(parameters: Sequence[nn.Parameter]) -> None:
    """Start from the leader's weights: random numbers may differ between devices."""
    with torch.no_grad():
        broadcast([parameter.data for parameter in parameters])


def average_gradients(parameters: Sequence[nn.Parameter], flags: Sequence[bool]) -> list[bool]:
    """Replace gradients by their mean over ranks, in place; which of ``flags`` are set on any rank.

    One all-reduce for each dtype, of all gradients in the parameters' order: every rank adds up the same
    numbers in the same order. A parameter without a gradient here counts as 0.
    """
    here = ranks()
    if here.count == 1:
        return list(flags)
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat([_gradient(parameter).flatten() for parameter in group])
        distributed.all_reduce(flat)
        flat /= here.count
        parts = flat.split([parameter.numel() for parameter in group])
        for parameter, part in zip(group, parts, strict=True):
            parameter.grad = part.view_as(parameter)
    told = torch.tensor([float(flag) for flag in flags])
    distributed.all_reduce(told)
    return [bool(value) for value in told]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def first_told(words: str | None) -> str | None:
    """What the first rank that has anything to say says, on every rank."""
    return next((each for each in gathered(words) if each is not None), None)


def summed(values: dict[str, float]) -> dict[str, float]:
    """Every rank's values added up by name, on every rank."""
    total: dict[str, float] = {}
    for each in gathered(values):
        for name, value in each.items():
            total[name] = total.get(name, 0.0) + value
    return total
