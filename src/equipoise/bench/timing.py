"""Interleaved rounds: every contestant is measured in every round, so that a slow spell hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from equipoise.bench.memory import measured
from equipoise.bench.setting import Call

ROUND = 0.1
"""Seconds a round lasts at least: shorter calls are repeated within it."""
KEEP = 2.0
"""Seconds from which on a contestant's first call counts as its first round; shorter ones warm up."""
MOST_REPEATS = 2000


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something to time.

    Attributes:
        name: of the operator or peer.
        prepare: makes what it runs on, and returns the call to time.
        unavailable: why it cannot run; empty where it can.
        held: bytes its cache or state holds, where it has one.
    """

    name: str
    prepare: Callable[[], Call] | None = None
    unavailable: str = ""
    held: int | None = None


@dataclass
class Times:
    """Seconds a call, one entry a round.

    Attributes:
        wall: by the clock.
        process: of the processor's time this process got, all threads together: what holds on a busy
            machine.
        repeats: calls in a round.
        peak: bytes beyond the result at most, in the first call; None where unknown.
        cut: why there are fewer rounds than asked for.
    """

    wall: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    repeats: int = 1
    peak: int | None = None
    cut: str = ""

    @property
    def median(self) -> float:
        """Median seconds by the clock."""
        return statistics.median(self.wall)

    @property
    def process_median(self) -> float:
        """Median seconds of processor time."""
        return statistics.median(self.process)


@dataclass
class _Runner:
    name: str
    call: Call
    times: Times
    spent: float = 0.0


def race(contestants: Sequence[Contestant], *, rounds: int, budget: float, device: str) -> dict[str, Times]:
    """Time all contestants that can run, in interleaved rounds.

    Args:
        contestants: who runs; those that are unavailable are left out of the result.
        rounds: how many.
        budget: seconds after which a contestant runs no further round; it has at least one.
        device: where; calls on a GPU are waited for.
    """
    runners = [
        _first(_Runner(one.name, one.prepare(), Times()), device)
        for one in contestants
        if one.prepare is not None
    ]
    for turn in range(rounds):
        for runner in runners if turn % 2 == 0 else reversed(runners):
            if len(runner.times.wall) > turn:
                continue
            last = runner.times.wall[-1] * runner.times.repeats if runner.times.wall else 0.0
            if runner.times.wall and runner.spent + last > budget:
                runner.times.cut = (
                    f"{len(runner.times.wall)} of {rounds} rounds, for the budget of {budget:g} s"
                )
                continue
            _round(runner, device)
    return {runner.name: runner.times for runner in runners}


def _first(runner: _Runner, device: str) -> _Runner:
    """The first call: its memory, how often a round repeats it, and its time where it is long."""
    wall, process = time.perf_counter(), time.process_time()
    took: list[float] = []

    def timed() -> object:
        nonlocal wall, process
        wall, process = time.perf_counter(), time.process_time()
        result = runner.call()
        _wait(device)
        took.extend((time.perf_counter() - wall, time.process_time() - process))
        return result

    _, runner.times.peak = measured(timed, device)
    if took[0] >= KEEP:
        runner.times.wall.append(took[0])
        runner.times.process.append(took[1])
        runner.spent = took[0]
        return runner
    began = time.perf_counter()
    runner.call()
    _wait(device)
    again = time.perf_counter() - began
    runner.times.repeats = min(MOST_REPEATS, max(1, round(ROUND / max(again, 1e-9))))
    return runner


def _round(runner: _Runner, device: str) -> None:
    repeats = runner.times.repeats
    wall, process = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        runner.call()
    _wait(device)
    took = time.perf_counter() - wall
    runner.times.process.append((time.process_time() - process) / repeats)
    runner.times.wall.append(took / repeats)
    runner.spent += took


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
