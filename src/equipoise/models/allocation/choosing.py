"""Sharing a byte budget between windows and linear branches: arithmetic on what was measured.

Nothing here runs a model. Costs are bytes of decode state, losses are nats per token.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from equipoise.config import ConfigError

Curve = Mapping[int, float]
"""Loss by the window of one head (or of whatever shares a window), in nats per token."""


@dataclass(frozen=True)
class Costs:
    """What state costs in one model, in bytes.

    Attributes:
        token: of one more token in one head's window: its K and V.
        head: of one state of a linear branch: S and z.
        sinks: tokens that join every window and are paid for too.
        elsewhere: of one state in a layer without chosen heads.
    """

    token: int
    head: int
    sinks: int
    elsewhere: int = 0

    def windows(self, tokens: Sequence[int]) -> int:
        """Of the windows of all heads, sinks included."""
        return self.token * sum(window + self.sinks for window in tokens)

    def linear(self, chosen: Sequence[Sequence[int]], heads: Sequence[int]) -> int:
        """Of all linear branches: by layer, the states chosen, and how many it has elsewhere if none is."""
        return sum(
            self.head * len(of) if of else self.elsewhere * count
            for of, count in zip(chosen, heads, strict=True)
        )


def hull(curve: Curve) -> list[tuple[int, float]]:
    """The lower convex hull of a curve that is taken to fall: (window, loss) in order of windows.

    Sharing token by token is only right on a convex curve: where it is not, a small step looks useless that
    a larger one would have repaid.
    """
    points: list[tuple[int, float]] = []
    for window in sorted(curve):
        loss = min(curve[w] for w in curve if w <= window)  # a larger window can do what a smaller one does
        while len(points) > 1 and _slope(points[-2], points[-1]) >= _slope(points[-1], (window, loss)):
            points.pop()
        points.append((window, loss))
    return points


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def share_windows(curves: Sequence[Curve], tokens: int) -> list[int]:
    """Windows that minimise the sum of the heads' losses, each read off its hull, within ``tokens`` in all.

    Every head has the smallest window of its curve at least. What no curve can use (windows beyond the
    largest measured) is left over.

    Raises:
        ConfigError: not enough tokens for the smallest windows.
    """
    hulls = [hull(curve) for curve in curves]
    windows = [points[0][0] for points in hulls]
    left = tokens - sum(windows)
    if left < 0:
        raise ConfigError(
            f"expected a state of at least {sum(windows)} window tokens over {len(curves)} heads, got "
            f"{tokens}: raise --state-bytes."
        )
    # segments of one head come in order of their slopes, because hulls are convex
    segments = [
        (_slope(start, stop), head, stop[0] - start[0])
        for head, points in enumerate(hulls)
        for start, stop in itertools.pairwise(points)
    ]
    heapq.heapify(segments)
    while segments and left:
        slope, head, length = heapq.heappop(segments)
        if slope >= 0:
            break
        windows[head] += min(length, left)
        left -= min(length, left)
    return windows


def even_windows(heads: int, tokens: int) -> list[int]:
    """The same window in every head, the first ones a token longer where it does not divide.

    Raises:
        ConfigError: less than a token a head.
    """
    if tokens < heads:
        raise ConfigError(
            f"expected a state of at least one window token in each of {heads} heads, got {tokens}: raise "
            "--state-bytes."
        )
    return [tokens // heads + (head < tokens % heads) for head in range(heads)]


def improved(
    windows: Sequence[int],
    loss: Callable[[list[int]], float],
    *,
    smallest: int,
    longest: int,
    measurements: int,
) -> list[int]:
    """Windows after moves of tokens from one head to another, for as long as that makes the loss smaller.

    First 16 tokens at a time, then 8, 4, 2. Each round measures what every head would lose by giving and gain
    by taking, then tries pairs, the most promising first, and takes the first that is better.

    Args:
        windows: to start from.
        loss: of windows, to be measured.
        smallest, longest: no window gets shorter, or longer.
        measurements: stop after so many.
    """
    best, left = list(windows), measurements

    def measured(tried: list[int]) -> float:
        nonlocal left
        left -= 1
        return loss(tried)

    def moved(place: int, tokens: int, of: list[int]) -> list[int]:
        return [window + tokens * (at == place) for at, window in enumerate(of)]

    least = measured(best) if left > 0 else math.inf
    for step in MOVES:
        better = True
        while better and left > 2 * len(best):
            better = False
            givers = [place for place, window in enumerate(best) if window - step >= smallest]
            give = sorted(givers, key=lambda place: measured(moved(place, -step, best)))
            takers = [place for place, window in enumerate(best) if window + step <= longest]
            take = sorted(takers, key=lambda place: measured(moved(place, step, best)))
            for giver, taker in itertools.product(give[:PAIRS], take[:PAIRS]):
                tried = moved(taker, step, moved(giver, -step, best))
                if giver == taker or left <= 0:
                    continue
                if (found := measured(tried)) < least - NOTICED:
                    best, least, better = tried, found, True
                    break
    return best


def with_fewer_sinks(
    windows: Sequence[Sequence[int]],
    sinks: int,
    loss: Callable[[list[list[int]], list[int]], float],
    *,
    longest: int,
) -> tuple[list[list[int]], list[int]]:
    """Windows and sinks by layer, of the same bytes: every window of a layer is as many tokens longer as the
    layer has fewer sinks.

    First as many are tried in all layers at once, then layer by layer what is better there.

    Args:
        windows: by layer, beside ``sinks`` in every one.
        sinks: to begin with.
        loss: of windows and sinks by layer, to be measured.
        longest: no window gets longer; where one would, its layer keeps more sinks.
    """

    def of(fewer: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        grown = [[window + sinks - left for window in own] for own, left in zip(windows, fewer, strict=True)]
        return grown, list(fewer)

    least_sinks = [max(0, sinks - max(0, longest - max(own))) for own in windows]  # longer windows do not fit
    best = [sinks] * len(windows)
    least = loss(*of(best))
    counts = fewer_sinks(sinks)
    for count in counts:
        tried = [max(count, kept) for kept in least_sinks]
        if (found := loss(*of(tried))) < least - NOTICED:
            best, least = tried, found
    for layer in range(len(best)):
        for count in (sinks, *counts):
            tried = [*best[:layer], max(count, least_sinks[layer]), *best[layer + 1 :]]
            if tried != best and (found := loss(*of(tried))) < least - NOTICED:
                best, least = tried, found
    return of(best)


def fewer_sinks(sinks: int) -> list[int]:
    """Numbers of sinks that are tried in place of more: half as many and half of that, to 1, and none."""
    counts = [sinks]
    while counts[-1]:
        counts.append(counts[-1] // 2)
    return counts[1:]


MOVES, PAIRS = (16, 8, 4, 2), 4
"""Tokens that are moved at a time; heads that are tried as givers and takers in one round."""
NOTICED = 1e-4
"""Nats per token: a change must be worth so much."""


def curve_of(worth: Sequence[float], sizes: Sequence[int]) -> Curve:
    """What is still lost at each window, of what every widening restores: the last one to full softmax."""
    return {size: sum(worth[place:]) for place, size in enumerate(sizes)}


def chosen_heads(
    importance: Sequence[Sequence[float]], *, most: int, least_share: float
) -> list[tuple[int, ...]]:
    """Heads that get a linear branch, by layer: the most important ones.

    Args:
        importance: of each head by layer, in nats per token that full attention in it restores.
        most: heads that can be paid for.
        least_share: of the most important head's importance, below which a head gets none.
    """
    ranked = sorted(
        ((value, layer, head) for layer, row in enumerate(importance) for head, value in enumerate(row)),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    bar = least_share * ranked[0][0]
    taken = [(layer, head) for value, layer, head in ranked[:most] if value > 0 and value >= bar]
    return [tuple(sorted(head for at, head in taken if at == layer)) for layer in range(len(importance))]


def widest_heads(
    importance: Sequence[Sequence[float]],
    head_bytes: Mapping[int, int],
    affordable: int,
    *,
    least_share: float,
) -> tuple[int, list[tuple[int, ...]]]:
    """The widest states that every head in need of one can have, and those heads by layer.

    Args:
        importance: as in `chosen_heads`.
        head_bytes: of a state, by its width.
        affordable: bytes for all of them; the most important head gets the narrowest state in any case.
        least_share: as in `chosen_heads`.

    Returns:
        The narrowest, and as many heads as can be paid for, where not all can have one.
    """
    every = sum(map(len, importance))
    needed = sum(map(len, chosen_heads(importance, most=every, least_share=least_share)))
    fitting = [width for width, size in head_bytes.items() if 0 < needed * size <= affordable]
    width = max(fitting, default=min(head_bytes))
    most = max(1, affordable // head_bytes[width])
    return width, chosen_heads(importance, most=most, least_share=least_share)
