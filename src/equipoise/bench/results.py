"""A benchmark run: what was measured, and what it comes to beside each peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from equipoise.bench.hardware import Hardware, is_busy
from equipoise.bench.peers import OURS
from equipoise.bench.setting import BenchSetting, Theme
from equipoise.bench.timing import Times

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant at one length.

    Attributes:
        measure: what was timed: the theme, or one of the model's (prefill, decode, train).
        length: T, or tokens of context.
        name: the contestant.
        times: None where it did not run.
        reason: why it did not.
        held: bytes of its cache or state, where it has one.
        tokens: tokens a call handles.
    """

    measure: str
    length: int
    name: str
    times: Times | None = None
    reason: str = ""
    held: int | None = None
    tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A peer's time over ours.

    Attributes:
        value: of the medians, by the clock.
        low, high: smallest and largest within a round.
        process: of the medians of processor time.
    """

    value: float
    low: float
    high: float
    process: float


AT_MOST = 1.5
"""Measured over predicted, end to end, that is still what the operators promise."""


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """One context.

    Attributes:
        length: tokens of context.
        measured, predicted: seconds a token, by the clock.
        process: measured over predicted in processor time, which other work on the machine disturbs less.
    """

    length: int
    measured: float
    predicted: float
    process: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted

    @property
    def met(self) -> bool:
        """Whether the hybrid is no slower than its operators promise."""
        return self.ratio <= AT_MOST


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        theme, setting, hardware: what, on what, where.
        rows: in order of measure, length and contestant.
        checked: what the correctness gate went through.
        command: the command line that measures the same.
        date: ISO date.
        load: the machine's load average at the start and at the end.
        notes: what else to know.
        end_to_end: decoding through ``generate`` beside what the operators predict, of whole models.
    """

    theme: Theme
    setting: BenchSetting
    hardware: Hardware
    rows: tuple[Row, ...]
    checked: tuple[str, ...]
    command: str
    date: str
    load: tuple[float, float]
    notes: tuple[str, ...] = field(default=())
    end_to_end: tuple[EndToEnd, ...] = field(default=())

    @property
    def name(self) -> str:
        """theme_hardware_date, of the files; every setting that is not the default is in the theme."""
        setting = self.setting
        marks = [setting.dtype] if self.theme != "model" else [setting.dtype, "model"]
        marks += ["maps"] if setting.features == "maps" else []
        marks += [f"{setting.heads}-{setting.kv_heads}-heads"] if setting.heads != setting.kv_heads else []
        marks = [mark for mark in marks if mark != self.theme]
        return f"{'-'.join([self.theme, *marks])}_{self.hardware.slug}_{self.date}"

    @property
    def busy(self) -> bool:
        """Whether others kept the machine busy meanwhile, so that wall times say little."""
        return any(is_busy(average, self.hardware, self.setting.threads) for average in self.load[:1])

    @property
    def measures(self) -> list[str]:
        """What was timed, in order."""
        return list(dict.fromkeys(row.measure for row in self.rows))

    def row(self, name: str, length: int, measure: str | None = None) -> Row | None:
        """The row of a contestant; None where there is none."""
        wanted = self.theme if measure is None else measure
        found = [r for r in self.rows if (r.name, r.length, r.measure) == (name, length, wanted)]
        return found[0] if found else None

    def ratio(self, row: Row) -> Ratio | None:
        """A peer's time over ours at the same length; None for ours, or where one did not run."""
        ours = self.row(OURS, row.length, row.measure)
        if row.name == OURS or ours is None or ours.times is None or row.times is None:
            return None
        rounds = [peer / own for peer, own in zip(row.times.wall, ours.times.wall, strict=False)]
        return Ratio(
            value=row.times.median / ours.times.median, low=min(rounds), high=max(rounds),
            process=row.times.process_median / ours.times.process_median,
        )  # fmt: skip


def to_data(run: Run) -> dict[str, Any]:
    """The JSON of a run."""
    return {
        "format": FORMAT,
        "theme": run.theme,
        "command": run.command,
        "date": run.date,
        "hardware": asdict(run.hardware),
        "load_average": list(run.load),
        "busy": run.busy,
        "setting": asdict(run.setting),
        "checked": list(run.checked),
        "notes": list(run.notes),
        "rows": [_row_data(run, row) for row in run.rows],
        "end_to_end": [
            {
                "length": one.length,
                "seconds_a_token": one.measured,
                "predicted": one.predicted,
                "ratio": one.ratio,
                "process_ratio": one.process,
                "at_most": AT_MOST,
                "met": one.met,
            }
            for one in run.end_to_end
        ],
    }


def _row_data(run: Run, row: Row) -> Mapping[str, Any]:
    ratio, times = run.ratio(row), row.times
    return {
        "measure": row.measure,
        "length": row.length,
        "name": row.name,
        "reason": row.reason or None,
        "seconds": None if times is None else times.median,
        "process_seconds": None if times is None else times.process_median,
        "rounds": None if times is None else asdict(times),
        "times_ours": None if ratio is None else asdict(ratio),
        "cache_bytes": row.held,
        "tokens": row.tokens,
    }


def spread(times: Times) -> tuple[float, float, float]:
    """(median, smallest, largest) seconds by the clock."""
    return statistics.median(times.wall), min(times.wall), max(times.wall)
