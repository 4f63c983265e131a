"""What the operators have to reach on a CPU, one thread, and whether a run does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from equipoise.bench.peers import OURS
from equipoise.bench.results import Run
from equipoise.bench.setting import BenchSetting, Theme
from equipoise.pages import bytes_in_words
from equipoise.pages.content import UNDEFINED

Kind = Literal["ratio", "memory", "scratch", "growth", "bytes"]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure to reach.

    Attributes:
        theme, dtype, features: of the run it is read from.
        kind: ``ratio``: the peer's time over ours; ``memory``: our peak over the peer's; ``scratch``: our
            peak in bytes; ``growth``: our time at ``length`` over that at ``since``; ``bytes``: of our state,
            likewise.
        length, since: T, or tokens of context.
        peer: against whom.
        least: what has to be reached; for everything but ``ratio`` an upper bound.
        aim: what is aimed for, where something is.
    """

    theme: Theme
    kind: Kind
    length: int
    least: float
    aim: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    features: Literal["mapped", "maps"] = "mapped"
    peer: str = "sdpa"
    since: int = 0

    @property
    def what(self) -> str:
        """The figure in words."""
        words = {
            "ratio": f"{self.peer}'s time over ours",
            "memory": f"our memory over {self.peer}'s",
            "scratch": "scratch beyond the output",
            "growth": f"our time over that at {_thousands(self.since)}",
            "bytes": f"bytes of our state over those at {_thousands(self.since)}",
        }
        return f"{self.theme} {self.dtype} {_thousands(self.length)}: {words[self.kind]}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A bar beside what was measured; None where it was not.

    Attributes:
        value: by the clock.
        process: of processor time, where the figure is one of time.
    """

    bar: Bar
    value: float | None
    process: float | None
    command: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure by the clock reaches the bar."""
        return reaches(self.bar, self.value)

    @property
    def verdict(self) -> str:
        """`met`, `missed` or `not measured`."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def reaches(bar: Bar, value: float | None) -> bool | None:
    """Whether a figure is good enough; None where there is none."""
    if value is None:
        return None
    return value >= bar.least if bar.kind == "ratio" else value <= bar.least


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 and length else f"{length:,}"


def _ratios(
    theme: Theme, dtype: Literal["float32", "bfloat16"], *rows: tuple[int, float, float | None]
) -> list[Bar]:
    return [
        Bar(theme=theme, kind="ratio", dtype=dtype, length=length, least=least, aim=aim)
        for length, least, aim in rows
    ]


_BAND = Bar(theme="prefill", kind="ratio", length=16384, least=20.0, peer="band")
_TRANSFER = Bar(theme="transfer", kind="ratio", length=2048, least=4.5, peer="txt")
CPU_BARS: tuple[Bar, ...] = (
    *_ratios("prefill", "float32", (4096, 2.5, 4.0), (16384, 9.5, 14.0), (65536, 35.0, 55.0)),
    *_ratios("prefill", "bfloat16", (4096, 1.1, 2.0), (16384, 4.0, 8.0), (65536, 16.0, 30.0)),
    *_ratios("train", "float32", (16384, 5.0, 8.0)),
    *_ratios("decode", "float32", (1024, 2.3, 4.0), (16384, 100.0, None)),
    *_ratios("decode", "bfloat16", (4096, 2.5, None), (16384, 18.0, None)),
    _TRANSFER,
    replace(_TRANSFER, length=8192, least=6.0),
    replace(_TRANSFER, kind="memory", least=1 / 10),
    replace(_TRANSFER, kind="memory", length=8192, least=1 / 45),
    Bar(theme="prefill", kind="scratch", length=65536, least=32e6, features="maps"),
    _BAND,
    Bar(theme="prefill", kind="growth", length=65536, since=16384, least=4.4),
    Bar(theme="decode", kind="growth", length=16384, since=1024, least=1.1),
    Bar(theme="decode", kind="bytes", length=16384, since=1024, least=1.0),
)
"""One thread, batch 1, 8 heads of 64, window 64, feature dimension 128."""

_Read = Callable[[Run, Bar], tuple[float | None, float | None]]


def judge(runs: Sequence[Run]) -> list[Outcome]:
    """Every bar that one of the runs speaks of, in the table's order; the rest are left out."""
    outcomes: list[Outcome] = []
    for bar in CPU_BARS:
        speaking = [run for run in runs if applies(run.setting) and _speaks(run, bar)]
        for run in speaking[-1:]:
            value, process = _READ[bar.kind](run, bar)
            outcomes.append(Outcome(bar=bar, value=value, process=process, command=run.command))
    return outcomes


def applies(setting: BenchSetting) -> bool:
    """Whether a setting is the one the bars are set for."""
    return replace(setting, dtype="float32", features="mapped") == BenchSetting()


def _speaks(run: Run, bar: Bar) -> bool:
    setting = run.setting
    if (run.theme, setting.dtype, setting.features) != (bar.theme, bar.dtype, bar.features):
        return False
    names = {row.name for row in run.rows}
    lengths = {row.length for row in run.rows}
    if bar.kind in ("ratio", "memory") and bar.peer not in names:
        return False
    return {bar.length, bar.since or bar.length} <= lengths


def _ratio(run: Run, bar: Bar) -> tuple[float | None, float | None]:
    row = run.row(bar.peer, bar.length)
    ratio = None if row is None else run.ratio(row)
    return (None, None) if ratio is None else (ratio.value, ratio.process)


def _peak(run: Run, name: str, length: int) -> int | None:
    row = run.row(name, length)
    return None if row is None or row.times is None else row.times.peak


def _memory(run: Run, bar: Bar) -> tuple[float | None, float | None]:
    ours, theirs = _peak(run, OURS, bar.length), _peak(run, bar.peer, bar.length)
    return (None if ours is None or not theirs else ours / theirs), None


def _scratch(run: Run, bar: Bar) -> tuple[float | None, float | None]:
    peak = _peak(run, OURS, bar.length)
    return None if peak is None else float(peak), None


def _growth(run: Run, bar: Bar) -> tuple[float | None, float | None]:
    late, early = run.row(OURS, bar.length), run.row(OURS, bar.since)
    if late is None or early is None or late.times is None or early.times is None:
        return None, None
    return (
        late.times.median / early.times.median,
        late.times.process_median / early.times.process_median,
    )


def _bytes(run: Run, bar: Bar) -> tuple[float | None, float | None]:
    late, early = run.row(OURS, bar.length), run.row(OURS, bar.since)
    if late is None or early is None or late.held is None or not early.held:
        return None, None
    return late.held / early.held, None


_READ: dict[Kind, _Read] = {
    "ratio": _ratio, "memory": _memory, "scratch": _scratch, "growth": _growth, "bytes": _bytes,
}  # fmt: skip


def in_words(bar: Bar, value: float | None) -> str:
    """A figure of a bar's kind: `9.5x`, `1/45`, `32 MB`."""
    if value is None:
        return UNDEFINED
    if bar.kind == "scratch":
        return f"{value / 1e6:.1f} MB ({bytes_in_words(round(value))})"
    if bar.kind == "memory":
        return f"1/{1 / value:,.{0 if value < 0.01 else 1}f}".replace(".0", "") if value > 0 else "0"
    return f"{value:.3g}x"
