"""matplotlib for pages: no display, no global state left behind, equal input gives equal text.

The background is white by design. In dark mode a page turns every colour's lightness around and keeps its
hue, which needs nothing from a plot: text stays as legible as it was, so captions should name hues (blue,
orange), not shades (dark, light).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart with any common colour vision, and by lightness in print.
BOTH, WINDOW, LINEAR, NEUTRAL, CONTROL = "#1b3a4b", "#0072b2", "#d55e00", "#a0a0a0", "#009e73"
DONOR_COLOUR, UNTRAINED_COLOUR = "#222222", "#cc79a7"
SERIES = (WINDOW, LINEAR, CONTROL, UNTRAINED_COLOUR, "#e69f00", "#56b4e9", BOTH, NEUTRAL)
INK, GRID = "#222222", "#dddddd"
FONT = 10.0
WIDTH = 5.0
"""Inches: narrow, so that a plot stays readable on a phone."""


def canvas(height: float = 3.4, *, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the pages' style; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    style(axes)
    return figure, axes


def style(axes: Axes) -> None:
    """Light grid, no frame at the top and right."""
    axes.set_facecolor("white")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT - 1, colors=INK, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def printable(label: str, *, longest: int = 26) -> str:
    """A label the bundled font can draw: anything outside printable ASCII becomes a question mark."""
    text = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in label)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def as_svg(figure: Figure, *, salt: str) -> str:
    """The figure as an `<svg>` element: no prolog, no metadata.

    Args:
        figure: drawn.
        salt: tells the ids of several plots on one page apart; the same input gives the same ids.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": f"equipoise-{salt}", "hatch.linewidth": 0.8}):
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
