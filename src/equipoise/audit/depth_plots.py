"""The plots of attribution in depth, as inline SVG: heat maps of layers by heads, bars by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from equipoise.audit.depth import LayerShapley
from equipoise.pages.plotting import FONT, INK, LINEAR, WIDTH, WINDOW, as_svg, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL = 0.24  # inches, for as long as they fit
_ANNOTATED = 8
"""Heads a layer up to which every cell carries its figure."""
_TICKS = 16


def heat_map(
    values: Sequence[Sequence[float]], layers: Sequence[int], *, unit: str, salt: str, signed: bool
) -> str:
    """A map of layers (down) by heads (across).

    Args:
        values: [layer][head]; cells that are NaN stay white with a cross.
        layers: indices of the layers.
        unit: of the colour bar.
        salt: tells this plot from others on the page.
        signed: whether zero is in the middle: orange above it, purple below.
    """
    grid = np.array(values, dtype=np.float64)
    rows, columns = grid.shape
    figure, axes = canvas(height=max(1.6, 1.0 + min(_CELL * rows, 6.0)), width=WIDTH)
    axes.grid(visible=False)
    finite = np.abs(grid[np.isfinite(grid)])
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image = axes.imshow(
        np.ma.masked_invalid(grid), aspect="auto", interpolation="nearest",
        cmap="PuOr_r" if signed else "YlOrBr", vmin=-top if signed else 0, vmax=top,
    )  # fmt: skip
    _annotate(axes, grid, top)
    axes.set_xlabel("head", fontsize=FONT)
    axes.set_ylabel("layer", fontsize=FONT)
    _ticks(axes, rows, columns, layers)
    bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.02)
    bar.ax.tick_params(labelsize=FONT - 2, colors=INK, length=0)
    bar.set_label(unit, fontsize=FONT - 1, color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return as_svg(figure, salt=salt)


def _annotate(axes: Axes, grid: NDArray[np.float64], top: float) -> None:
    """Figures in the cells of a small map; crosses in cells that have none."""
    rows, columns = grid.shape
    for row in range(rows):
        for column in range(columns):
            value = float(grid[row, column])
            if not math.isfinite(value):
                axes.text(column, row, "x", fontsize=7, color=INK, ha="center", va="center")
            elif columns <= _ANNOTATED:
                ink = "white" if abs(value) > 0.65 * top else INK
                axes.text(column, row, _short(value), fontsize=7, color=ink, ha="center", va="center")


def _short(value: float) -> str:
    """Two or three figures: `0.012`, `1.3`, `12`."""
    text = f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
    return "0" if float(text) == 0 else text


def _ticks(axes: Axes, rows: int, columns: int, layers: Sequence[int]) -> None:
    for axis, count, names in (
        (axes.xaxis, columns, [str(head) for head in range(columns)]),
        (axes.yaxis, rows, [str(layer) for layer in layers]),
    ):
        shown = range(0, count, -(-count // _TICKS))
        axis.set_ticks(list(shown), [names[index] for index in shown])


def shapley_chart(games: Sequence[LayerShapley], *, unit: str, salt: str) -> str:
    """Shapley values by layer of games of one reading: blue the window's, orange the linear branch's."""
    layers = sorted({player.layer for game in games for player in game.players})
    bars = [
        (player, value) for game in games for player, value in zip(game.players, game.values, strict=True)
    ]
    figure, axes = canvas(height=1.2 + 0.36 * len(layers))
    for branch, colour, shift in (("window", WINDOW, -0.2), ("linear", LINEAR, 0.2)):
        mine = [(player, value) for player, value in bars if player.branch == branch]
        if not mine:
            continue
        rows = [layers.index(player.layer) + shift for player, _ in mine]
        axes.barh(rows, [value.value for _, value in mine], height=0.36, color=colour, label=branch)
        for row, (_, value) in zip(rows, mine, strict=True):
            if value.defined:
                axes.plot(value.ci95, [row, row], color=INK, linewidth=1.0, marker="|", markersize=4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.invert_yaxis()
    axes.set_ylabel("layer", fontsize=FONT)
    axes.set_xlabel(f"Shapley value, {unit}", fontsize=FONT)
    axes.legend(fontsize=FONT - 1, frameon=False)
    return as_svg(figure, salt=salt)
