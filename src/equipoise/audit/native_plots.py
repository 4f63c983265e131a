"""The plots of a native audit, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.audit.native import MixerCost, NativeAudit
from equipoise.audit.native_scores import FILLS, Fill
from equipoise.audit.native_types import ROLES, Role
from equipoise.pages.plotting import FONT, INK, LINEAR, WINDOW, as_svg, canvas, printable
from equipoise.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[Role, str] = {"attention": WINDOW, "linear": LINEAR}
NAMES: dict[Role, str] = {"attention": "attention", "linear": "linear mixers"}
_BAR = 0.2  # inches a bar
_RECOVERED_LIMITS = (-0.6, 1.5)
_SPREAD = 20.0
"""A cost this many times the median one makes the axis logarithmic."""


def recovered_chart(audits: Sequence[NativeAudit], labels: Sequence[str]) -> str:
    """What attention alone and the linear mixers alone recover, zeros and means in the others' place."""
    per_audit = len(ROLES) * len(FILLS) + 1
    figure, axes = canvas(height=1.1 + _BAR * per_audit * len(audits))
    ticks: list[tuple[float, str]] = []
    for index, (audit, label) in enumerate(zip(audits, labels, strict=True)):
        row = index * per_audit
        for role in ROLES:
            for fill in FILLS:
                _bar(axes, row, audit.fills[fill].recovered[role], role, fill, _RECOVERED_LIMITS)
                row += 1
        ticks.append((index * per_audit + (per_audit - 2) / 2, printable(label, longest=16)))
    axes.axvline(1, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], parse_math=False)
    axes.set_xlabel("recovered: 0 = no mixer, 1 = all (dashed)", fontsize=FONT)
    axes.set_ylim(per_audit * len(audits) - 1.4, -0.6)
    _legend(axes)
    return as_svg(figure, salt="native-recovered")


def layers_chart(audit: NativeAudit) -> str:
    """What taking each mixer out costs, by layer: a bar for zeros, a mark for mean outputs."""
    costs = audit.layers
    figure, axes = canvas(height=1.1 + _BAR * len(costs))
    for row, layer in enumerate(costs):
        role = layer.mixer.place.role
        _bar(axes, row, layer.cost["zero"], role, "zero", (-math.inf, math.inf))
        axes.plot([layer.cost["mean"].value], [row], "D", markersize=4, color="white", markeredgecolor=INK)
    axes.axvline(0, color=INK, linewidth=0.8)
    if spread_out(costs):
        axes.set_xscale("symlog", linthresh=_median_cost(costs))
    axes.set_yticks(range(len(costs)), [f"{layer.mixer.place.layer}" for layer in costs])
    axes.set_ylabel("layer", fontsize=FONT)
    axes.set_xlabel("cost of taking the mixer out, nats per token", fontsize=FONT)
    axes.set_ylim(len(costs) - 0.4, -0.6)
    _legend(axes, marks=True)
    return as_svg(figure, salt=f"native-layers-{audit.name}")


def spread_out(costs: Sequence[MixerCost]) -> bool:
    """Whether a few costs would squeeze all others out of sight on a linear axis."""
    median = _median_cost(costs)
    return median > 0 and max(abs(layer.cost["zero"].value) for layer in costs) > _SPREAD * median


def _median_cost(costs: Sequence[MixerCost]) -> float:
    ordered = sorted(abs(layer.cost["zero"].value) for layer in costs)
    return ordered[len(ordered) // 2]


def _bar(axes: Axes, row: int, value: Estimate, role: Role, fill: Fill, limits: tuple[float, float]) -> None:
    """One bar with its interval; hatched for means, cut and labelled beyond the limits."""
    low, high = limits
    if not math.isfinite(value.value):
        axes.text(0.01, row, "undefined", fontsize=7, color=INK, va="center")
        return
    length = min(max(value.value, low), high)
    colour, mean = COLOURS[role], fill == "mean"
    axes.barh(
        row, length, height=0.8, facecolor="white" if mean else colour, edgecolor=colour,
        hatch="//////" if mean else None,
    )  # fmt: skip
    if length != value.value:
        text = f"{value.value:.2f}"
        side = "left" if value.value < low else "right"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.text(length, row, text, fontsize=7, color=INK, va="center", ha=side, bbox=box)
    elif value.defined:
        axes.plot(value.ci95, [row, row], color=INK, linewidth=1.0, marker="|", markersize=4)


def _legend(axes: Axes, *, marks: bool = False) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = []
    for role in ROLES:
        zeroed = NAMES[role] if marks else f"{NAMES[role]} alone, others zeroed"
        handles.append(Patch(facecolor=COLOURS[role], label=zeroed))
        if not marks:
            handles.append(
                Patch(
                    facecolor="white", edgecolor=COLOURS[role], hatch="//////",
                    label=f"{NAMES[role]} alone, others at their mean",
                )
            )  # fmt: skip
    if marks:
        handles.append(
            Line2D([], [], marker="D", linestyle="none", color="white", markeredgecolor=INK,
                   label="replaced by its mean")
        )  # fmt: skip
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3 if marks else 1,
        fontsize=FONT - 1.5, frameon=False, labelcolor=INK, borderaxespad=0.2,
    )  # fmt: skip
