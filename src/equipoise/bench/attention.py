"""Whole sequences: forward alone (prefill), and forward with backward (train)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from equipoise.bench.hardware import free_memory
from equipoise.bench.peers import PEERS
from equipoise.bench.results import Row
from equipoise.bench.setting import BenchSetting, Call, Inputs, UnavailableError, make_inputs
from equipoise.bench.timing import Contestant, Times, race
from equipoise.pages import bytes_in_words


def measure(
    setting: BenchSetting,
    lengths: Sequence[int],
    names: Sequence[str],
    *,
    training: bool,
    rounds: int,
    budget: float,
    told: Callable[[str], None],
) -> list[Row]:
    """Time every contestant at every length.

    Args:
        setting: what runs.
        lengths: T of each part.
        names: contestants, ours among them.
        training: forward and backward, rather than forward alone.
        rounds, budget: see `race`; a contestant whose last call hints at one beyond the budget is left out.
        told: hears what goes on.
    """
    rows: list[Row] = []
    last: dict[str, tuple[int, float]] = {}
    for length in sorted(lengths):
        told(f"{'train' if training else 'prefill'} {setting.dtype}, T = {length:,}")
        x = make_inputs(setting, length)
        with torch.inference_mode() if not training else nullcontext():
            contestants = [_contestant(setting, x, name, last, budget, training) for name in names]
            times = race(contestants, rounds=rounds, budget=budget, device=setting.device)
        for one in contestants:
            found = times.get(one.name)
            if found is not None:
                last[one.name] = length, found.median
            rows.append(_row(one, found, length, training))
        del x, contestants
        gc.collect()
    return rows


def _row(one: Contestant, times: Times | None, length: int, training: bool) -> Row:
    return Row(
        measure="train" if training else "prefill", length=length, name=one.name, times=times,
        reason=one.unavailable, tokens=length,
    )  # fmt: skip


def _contestant(
    setting: BenchSetting, x: Inputs, name: str, last: dict[str, tuple[int, float]], budget: float,
    training: bool,
) -> Contestant:  # fmt: skip
    length = x.q.shape[2]
    reason = too_large(PEERS[name].bytes_at(setting, length), setting, factor=2 if training else 1)
    reason = reason or too_long(last.get(name), length, budget)
    if reason:
        return Contestant(name=name, unavailable=reason)
    if training:
        x.requires_grad()
    try:
        forward = PEERS[name].build(setting, x)
    except UnavailableError as error:
        return Contestant(name=name, unavailable=str(error))
    return Contestant(name=name, prepare=lambda: _step(x, forward) if training else forward)


def _step(x: Inputs, forward: Callable[[], torch.Tensor]) -> Call:
    """Forward and backward; returns the output and all gradients."""
    given = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(x.q)
    leaves = x.leaves()

    def call() -> object:
        out = forward()
        return out, torch.autograd.grad(out, leaves, given, allow_unused=True)

    return call


def too_large(needed: int, setting: BenchSetting, *, factor: int = 1) -> str:
    """Why a contestant's memory is not there; empty where it is, or nobody knows."""
    free = free_memory(setting.device)
    if free is None or needed * factor <= 0.9 * free:
        return ""
    return f"needs {bytes_in_words(needed * factor)} at least, {bytes_in_words(free)} are free"


def too_long(last: tuple[int, float] | None, length: int, budget: float) -> str:
    """Why a contestant is not started: growing as fast as its last lengths can, one call fills the budget.

    Only decides; no figure is extrapolated.
    """
    if last is None:
        return ""
    before, seconds = last
    if seconds * (length / before) ** 2 <= budget:
        return ""
    return f"{seconds:.1f} s at T = {before:,}: quadratic growth would pass the budget of {budget:g} s"
