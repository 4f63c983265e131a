"""Figures in words."""

from __future__ import annotations

import math

from equipoise.pages.content import UNDEFINED
from equipoise.statistics import Estimate


def percent(value: Estimate | float, *, interval: bool = True) -> str:
    """`96.0% [95.1, 96.8]`, or a dash where undefined."""
    known = value if isinstance(value, Estimate) else Estimate(value, (math.nan, math.nan))
    if not math.isfinite(known.value):
        return UNDEFINED
    point = f"{known.value:.1%}"
    if not interval or not known.defined:
        return point
    return f"{point} [{100 * known.ci95[0]:.1f}, {100 * known.ci95[1]:.1f}]"


def number(value: Estimate | float, *, digits: int = 3, signed: bool = False) -> str:
    """`3.061 [3.012, 3.107]`, or a dash where undefined."""
    known = value if isinstance(value, Estimate) else Estimate(value, (math.nan, math.nan))
    if not math.isfinite(known.value):
        return UNDEFINED
    form = f"{'+' if signed else ''}.{digits}f"
    if not known.defined:
        return format(known.value, form)
    low, high = known.ci95
    return f"{known.value:{form}} [{low:{form}}, {high:{form}}]"


def bytes_in_words(count: int) -> str:
    """Bytes in binary units: `1.5 MiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
