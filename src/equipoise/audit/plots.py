"""The audit's two plots: what each branch state recovers, and who earns what.

Bars are horizontal, so that they stay readable on a phone and grow downwards with the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.audit.attribution import UNTRAINED, Reading
from equipoise.pages.plotting import (
    BOTH,
    CONTROL,
    FONT,
    INK,
    LINEAR,
    NEUTRAL,
    UNTRAINED_COLOUR,
    WINDOW,
    as_svg,
    canvas,
    printable,
)
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from equipoise.audit.report import AuditReport

MANY = 8
"""From this many runs on, plots leave out the literal reading and the sinks; tables keep them."""
_WIDTH, _BAR, _PAD = 4.6, 0.165, 0.30  # inches: the figure, a bar, between runs


@dataclass(frozen=True, slots=True)
class Bar:
    """One kind of bar: legend label, colour, and whether it is the hatched (literal) reading."""

    label: str
    colour: str
    literal: bool = False
    always: bool = True


_RECOVERED_BARS: tuple[tuple[str, Bar], ...] = (
    ("both", Bar("both branches", BOTH)),
    ("window_renormalised", Bar("window alone (weight 1)", WINDOW)),
    ("window", Bar("window, literal", WINDOW, literal=True, always=False)),
    ("linear_renormalised", Bar("linear alone (weight 1)", LINEAR)),
    ("linear", Bar("linear, literal", LINEAR, literal=True, always=False)),
    ("sinks", Bar("first 8 tokens only", NEUTRAL, always=False)),
)
_SHAPLEY_BARS: tuple[tuple[Reading, str, Bar], ...] = (
    ("renormalised", "window", Bar("window, renormalised", WINDOW)),
    ("renormalised", "linear", Bar("linear, renormalised", LINEAR)),
    ("renormalised", "interaction", Bar("interaction, renormalised", NEUTRAL)),
    ("literal", "window", Bar("window, literal", WINDOW, literal=True, always=False)),
    ("literal", "linear", Bar("linear, literal", LINEAR, literal=True, always=False)),
    ("literal", "interaction", Bar("interaction, literal", NEUTRAL, literal=True, always=False)),
)


def recovered_chart(report: AuditReport, labels: Sequence[str]) -> str:
    """Recovered performance per branch state and run: 0 is no attention, 1 the donor.

    `labels` are the runs' names, in the report's order.
    """
    kinds = [(state, bar) for state, bar in _RECOVERED_BARS if bar.always or len(labels) < MANY]
    rows = [[run.recovered[state] for state, _ in kinds] for run in report.runs]
    bars = [bar for _, bar in kinds]
    figure, axes, inches = _canvas(len(rows), bars=len(bars))
    # Beyond these, bars are cut and labelled: a diverged branch must not squeeze the scale that matters.
    limits = _limits(rows, lowest=-0.6, highest=1.5, at_least=1.12)
    _draw_groups(axes, rows, bars, labels, inches=inches, limits=limits)
    marks = [*_mark_controls(axes, report, bars=len(bars), inches=inches)]
    marks += _mark_untrained(axes, report, row=_position(kinds, "linear_renormalised"), inches=inches)
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("recovered: 0 = no attention, 1 = donor (dashed)", fontsize=FONT)
    _legend(figure, bars, marks)
    return as_svg(figure, salt="recovered")


def attribution_chart(report: AuditReport, labels: Sequence[str]) -> str:
    """Shapley value of each branch and their interaction, in nats per token, in both readings."""
    kinds = [part for part in _SHAPLEY_BARS if part[2].always or len(labels) < MANY]
    rows: list[list[Estimate]] = [
        [getattr(run.attribution[reading], part) for reading, part, _ in kinds] for run in report.runs
    ]
    # What the hybrids have to share out sets the scale; the parts can exceed it where a branch does harm.
    shared = [run.attribution["literal"] for run in report.runs]
    scale = max(0.1, *(parts.window.value + parts.linear.value for parts in shared))
    bars = [bar for _, _, bar in kinds]
    figure, axes, inches = _canvas(len(rows), bars=len(bars))
    limits = _limits(rows, lowest=-0.8 * scale, highest=1.5 * scale, at_least=0.1 * scale)
    _draw_groups(axes, rows, bars, labels, inches=inches, limits=limits)
    axes.set_xlabel("Shapley value, nats per token (right = helps)", fontsize=FONT)
    _legend(figure, bars, [])
    return as_svg(figure, salt="attribution")


def _position(kinds: Sequence[tuple[str, Bar]], state: str) -> int:
    return [name for name, _ in kinds].index(state)


def _mark_controls(axes: Axes, report: AuditReport, *, bars: int, inches: float) -> list[Line2D]:
    """A line across each run's bars where its control stands."""
    style: dict[str, Any] = {"color": CONTROL, "linewidth": 1.8}
    known = {
        index: run.control.recovered.value
        for index, run in enumerate(report.runs)
        if run.control is not None and run.control.recovered.defined
    }
    for index, value in known.items():
        top = index * inches - _BAR / 2
        axes.plot([value] * 2, [top, top + bars * _BAR], **style)
    return _in_legend("SWA + sinks at equal bytes", style) if known else []


def _mark_untrained(axes: Axes, report: AuditReport, *, row: int, inches: float) -> list[Line2D]:
    """A diamond on the linear branch's bar where it stood before its maps were trained."""
    style: dict[str, Any] = {
        "color": UNTRAINED_COLOUR, "linestyle": "none", "marker": "D", "markersize": 4.5,
        "markeredgecolor": INK, "markeredgewidth": 0.6,
    }  # fmt: skip
    low, high = axes.get_xlim()
    known = {
        index: run.recovered[UNTRAINED].value
        for index, run in enumerate(report.runs)
        if UNTRAINED in run.recovered and low <= run.recovered[UNTRAINED].value <= high
    }
    for index, value in known.items():
        axes.plot([value], [index * inches + row * _BAR], **style)
    return _in_legend("linear with untrained maps", style) if known else []


def _in_legend(label: str, style: dict[str, Any]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=label, **style)]


def _limits(
    rows: Sequence[Sequence[Estimate]], *, lowest: float, highest: float, at_least: float
) -> tuple[float, float]:
    """Axis limits around all intervals, within lowest..highest, with zero and `at_least` in view."""
    ends = [end for row in rows for value in row for end in (value.value, *value.ci95) if math.isfinite(end)]
    low, high = max(lowest, min([0.0, *ends])), min(highest, max([at_least, *ends]))
    margin = 0.03 * (high - low)
    return low - margin, high + margin


def _draw_groups(
    axes: Axes,
    rows: Sequence[Sequence[Estimate]],
    bars: Sequence[Bar],
    labels: Sequence[str],
    *,
    inches: float,
    limits: tuple[float, float],
) -> None:
    """A group of bars per run, its name above them."""
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for position, (value, bar) in enumerate(zip(row, bars, strict=True)):
            _draw(axes, index * inches + position * _BAR, value, bar, limits)
        _name(axes, index * inches, label)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(*limits)


def _canvas(runs: int, *, bars: int) -> tuple[Figure, Axes, float]:
    """Figure, axes, and the inches a run takes.

    y is in inches from the top, so bars are equally thick however many runs there are.
    """
    inches = bars * _BAR + _PAD
    height, below, above = runs * inches, 0.5, 0.2 * math.ceil((bars + 2) / 2) + 0.1
    total = height + below + above
    figure, axes = canvas(total, width=_WIDTH)
    figure.set_layout_engine("none")
    axes.set_position((0.03, below / total, 0.94, height / total))
    axes.set_ylim(height - _PAD / 2 + 0.05, -_PAD)
    axes.grid(visible=False, axis="y")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return figure, axes, inches


def _draw(axes: Axes, y: float, value: Estimate, bar: Bar, limits: tuple[float, float]) -> None:
    """One bar with its interval; an undefined value leaves a word, one beyond the limits its figure."""
    low, high = limits
    if not math.isfinite(value.value):
        axes.text(0.01 * (high - low), y, "undefined", fontsize=7, color=INK, va="center")
        return
    length = min(max(value.value, low), high)
    axes.barh(y, length, height=_BAR * 0.82, linewidth=0.8, **_paint(bar))
    if length != value.value:
        text = f"◀ {value.value:.2f}" if value.value < low else f"{value.value:.2f} ▶"
        inset = 0.01 * (high - low) * (1 if value.value < low else -1)
        side = "left" if value.value < low else "right"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.text(length + inset, y, text, fontsize=6.5, color=INK, va="center", ha=side, bbox=box)
    elif value.defined:
        axes.plot(value.ci95, [y, y], color=INK, linewidth=1.0, marker="|", markersize=4)


def _paint(bar: Bar) -> dict[str, Any]:
    return {
        "facecolor": "white" if bar.literal else bar.colour,
        "edgecolor": bar.colour,
        "hatch": "//////" if bar.literal else None,
    }


def _name(axes: Axes, top: float, label: str) -> None:
    """The run's name above its bars, inside the axes: names need no margin that would squeeze the bars."""
    axes.annotate(
        printable(label),
        xy=(0, top - _BAR * 0.5 - 0.03),
        xycoords=("axes fraction", "data"),
        fontsize=FONT,
        fontweight="bold",
        color=INK,
        va="bottom",
        parse_math=False,  # a recipe may be called a$b$c
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
    )


def _legend(figure: Figure, bars: Sequence[Bar], marks: Sequence[Line2D]) -> None:
    """Above the plot, in two columns: what is always there on the left."""
    from matplotlib.patches import Patch

    order = [*(bar for bar in bars if bar.always), *(bar for bar in bars if not bar.always)]
    figure.legend(
        handles=[*(Patch(label=bar.label, **_paint(bar)) for bar in order), *marks],
        loc="upper left",
        bbox_to_anchor=(0.02, 1.0),
        ncols=2,
        fontsize=FONT - 1.2,
        frameon=False,
        labelcolor=INK,
        handlelength=1.6,
        labelspacing=0.35,
    )
