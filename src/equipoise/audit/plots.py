"""The report's two charts, as inline SVG: no display, no global matplotlib state left behind, equal input
equal text.

Bars are horizontal and the figures narrow, so that they stay readable on a phone and grow downwards with the
runs. The background is white by design: the page puts them on a white card in dark mode too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.audit.attribution import Reading
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from equipoise.audit.report import AuditReport

# Okabe-Ito: told apart with any common colour vision, and by lightness in print.
BOTH, WINDOW, LINEAR, NEUTRAL, CONTROL = "#1b3a4b", "#0072b2", "#d55e00", "#a0a0a0", "#009e73"
INK, GRID = "#222222", "#dddddd"
_WIDTH, _FONT = 5.0, 10.0
_BAR = 0.165  # inches a bar
_PAD = 0.30  # inches between runs
_SHORT = 26


@dataclass(frozen=True, slots=True)
class Bar:
    """One kind of bar: legend label, colour, and whether it is the hatched (literal) reading."""

    label: str
    colour: str
    literal: bool = False


_RECOVERED_BARS: tuple[tuple[str, Bar], ...] = (
    ("both", Bar("both branches", BOTH)),
    ("window_renormalised", Bar("window alone (weight 1)", WINDOW)),
    ("window", Bar("window, literal (linear zeroed)", WINDOW, literal=True)),
    ("linear_renormalised", Bar("linear alone (weight 1)", LINEAR)),
    ("linear", Bar("linear, literal (window zeroed)", LINEAR, literal=True)),
    ("sinks", Bar("first 8 tokens only", NEUTRAL)),
)
_SHAPLEY_BARS: tuple[tuple[Reading, str, Bar], ...] = (
    ("renormalised", "window", Bar("window, renormalised", WINDOW)),
    ("renormalised", "linear", Bar("linear, renormalised", LINEAR)),
    ("renormalised", "interaction", Bar("interaction, renormalised", NEUTRAL)),
    ("literal", "window", Bar("window, literal", WINDOW, literal=True)),
    ("literal", "linear", Bar("linear, literal", LINEAR, literal=True)),
    ("literal", "interaction", Bar("interaction, literal", NEUTRAL, literal=True)),
)


def recovered_chart(report: AuditReport, labels: Sequence[str]) -> str:
    """Recovered performance per branch state and run: 0 is no attention, 1 the donor.

    `labels` are the runs' names, in the report's order.
    """
    rows = [[run.recovered[state] for state, _ in _RECOVERED_BARS] for run in report.runs]
    controls = [None if run.control is None else run.control.recovered for run in report.runs]
    figure, axes, inches = _canvas(len(rows), bars=len(_RECOVERED_BARS))
    # Beyond these, bars are cut and labelled: a diverged branch must not squeeze the scale that matters.
    limits = _limits(rows, lowest=-0.6, highest=1.5, at_least=1.12)
    bars = [bar for _, bar in _RECOVERED_BARS]
    _draw_groups(axes, rows, bars, labels, inches=inches, limits=limits)
    for index, control in enumerate(controls):
        if control is not None and control.defined:
            top = index * inches - _BAR / 2
            axes.plot([control.value] * 2, [top, top + len(bars) * _BAR], color=CONTROL, linewidth=1.8)
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("recovered: 0 = no attention, 1 = donor (dashed)", fontsize=_FONT)
    order = [bars[index] for index in (0, 1, 2, 5, 3, 4)]  # the legend fills by column
    _legend(figure, order, control=any(control is not None for control in controls))
    return _svg(figure, salt="recovered")


def attribution_chart(report: AuditReport, labels: Sequence[str]) -> str:
    """Shapley value of each branch and their interaction, in nats per token, in both readings."""
    rows: list[list[Estimate]] = [
        [getattr(run.attribution[reading], part) for reading, part, _ in _SHAPLEY_BARS] for run in report.runs
    ]
    # What the hybrids have to share out sets the scale; the parts can exceed it where a branch does harm.
    shared = [run.attribution["literal"] for run in report.runs]
    scale = max(0.1, *(parts.window.value + parts.linear.value for parts in shared))
    figure, axes, inches = _canvas(len(rows), bars=len(_SHAPLEY_BARS))
    bars = [bar for _, _, bar in _SHAPLEY_BARS]
    limits = _limits(rows, lowest=-0.8 * scale, highest=1.5 * scale, at_least=0.1 * scale)
    _draw_groups(axes, rows, bars, labels, inches=inches, limits=limits)
    axes.set_xlabel("Shapley value, nats per token (right = helps)", fontsize=_FONT)
    _legend(figure, bars, control=False)
    return _svg(figure, salt="attribution")


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
    from matplotlib.figure import Figure

    inches = bars * _BAR + _PAD
    height = runs * inches
    below, above = 0.62, 0.95
    figure = Figure(figsize=(_WIDTH, height + below + above), facecolor="white")
    total = height + below + above
    axes = figure.add_axes((0.03, below / total, 0.94, height / total))
    axes.set_facecolor("white")
    axes.set_ylim(height - _PAD / 2 + 0.05, -_PAD)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=_FONT, colors=INK, length=0)
    axes.set_yticks([])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
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
        _plain(label),
        xy=(0, top - _BAR * 0.5 - 0.03),
        xycoords=("axes fraction", "data"),
        fontsize=_FONT,
        fontweight="bold",
        color=INK,
        va="bottom",
        parse_math=False,  # a recipe may be called a$b$c
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
    )


def _legend(figure: Figure, bars: Sequence[Bar], *, control: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(label=bar.label, **_paint(bar)) for bar in bars]
    if control:
        handles.append(Line2D([], [], color=CONTROL, linewidth=2, label="SWA + sinks at equal bytes"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.02, 1.0),
        ncols=2,
        fontsize=_FONT - 1.2,
        frameon=False,
        labelcolor=INK,
        handlelength=1.6,
        labelspacing=0.35,
    )


def _plain(label: str) -> str:
    """A label the bundled font can draw: anything outside printable ASCII becomes a question mark."""
    text = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in label)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _svg(figure: Figure, *, salt: str) -> str:
    """The figure as an `<svg>` element: no prolog, no metadata, and the same ids for the same input."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": f"equipoise-{salt}", "hatch.linewidth": 0.8}):
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
