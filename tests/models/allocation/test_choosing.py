"""Sharing bytes, against all ways there are."""

from __future__ import annotations

import itertools

import pytest

from equipoise.config import ConfigError
from equipoise.models.allocation.choosing import (
    Costs,
    chosen_heads,
    even_windows,
    fewer_sinks,
    hull,
    improved,
    share_windows,
    widest_heads,
    with_fewer_sinks,
)

CURVES = (
    {2: 1.0, 4: 0.5, 8: 0.3, 16: 0.25},
    {2: 0.1, 4: 0.09, 8: 0.085, 16: 0.08},
    {2: 0.9, 4: 0.88, 8: 0.1, 16: 0.09},  # not convex: 4 alone is worth nothing
)


def between(curve: dict[int, float], window: int) -> float:
    """The lower hull at a window, written out: the least line between two measured points around it."""
    around = itertools.product([w for w in curve if w <= window], [w for w in curve if w >= window])
    return min(
        curve[low] if low == high else curve[low] + (curve[high] - curve[low]) * (window - low) / (high - low)
        for low, high in around
    )


@pytest.mark.parametrize("tokens", [6, 9, 12, 17, 24, 40, 48])
def test_no_other_way_is_better(tokens: int) -> None:
    def loss(windows: tuple[int, ...]) -> float:
        return sum(between(curve, window) for curve, window in zip(CURVES, windows, strict=True))

    ways = [way for way in itertools.product(range(2, 17), repeat=3) if sum(way) <= tokens]
    found = share_windows(CURVES, tokens)
    assert sum(found) <= tokens
    assert loss(tuple(found)) == pytest.approx(min(map(loss, ways)))


def test_what_no_curve_can_use_is_left() -> None:
    assert share_windows([{2: 1.0, 4: 0.5}, {2: 1.0, 4: 1.0}], 50) == [4, 2]


class TestImproved:
    @staticmethod
    def loss(windows: list[int]) -> float:
        """Least at 30, 6, 4 of 40 tokens; heads depend on one another."""
        one, two, three = windows
        return 1e-2 * ((one - 30) ** 2 + (two - 6) ** 2 + (three - 4) ** 2 + (one - 30) * (two - 6))

    def test_it_finds_the_least(self) -> None:
        found = improved([14, 13, 13], self.loss, smallest=2, longest=40, measurements=500)
        assert sum(found) == 40
        assert self.loss(found) <= 0.02  # moves are of two tokens at least

    def test_it_stops_in_time_and_never_gets_worse(self) -> None:
        for allowed in (0, 1, 5, 9, 20, 60):
            seen: list[list[int]] = []

            def counted(windows: list[int], seen: list[list[int]] = seen) -> float:
                seen.append(windows)
                return self.loss(windows)

            found = improved([14, 13, 13], counted, smallest=2, longest=40, measurements=allowed)
            assert len(seen) <= allowed
            assert self.loss(found) <= self.loss([14, 13, 13])

    def test_no_window_is_shorter_than_the_smallest(self) -> None:
        found = improved(
            [10, 10], lambda windows: -float(windows[0]), smallest=5, longest=40, measurements=500
        )
        assert found == [14, 6]

    def test_no_window_is_longer_than_the_longest(self) -> None:
        found = improved([10, 10], lambda w: -float(w[0]), smallest=2, longest=13, measurements=500)
        assert found == [12, 8]


class TestFewerSinks:
    @staticmethod
    def loss(windows: list[list[int]], sinks: list[int]) -> float:
        """Layer 0 wants one sink and layer 1 none; a token of window is worth less than that."""
        wrong = (sinks[0] - 1) ** 2 + sinks[1] ** 2
        return 1e-2 * wrong - 1e-3 * sum(map(sum, windows))

    def test_each_layer_gets_its_own(self) -> None:
        windows, sinks = with_fewer_sinks([[5, 9], [3, 3]], 4, self.loss, longest=40)
        assert sinks == [1, 0]
        assert windows == [[8, 12], [7, 7]]

    def test_all_are_kept_where_they_are_worth_more_than_windows(self) -> None:
        found = with_fewer_sinks([[5, 9], [3, 3]], 4, lambda w, s: -float(sum(s)), longest=40)
        assert found == ([[5, 9], [3, 3]], [4, 4])

    def test_what_is_alike_changes_nothing(self) -> None:
        assert with_fewer_sinks([[5], [3]], 4, lambda w, s: 1.0, longest=40)[1] == [4, 4]

    def test_no_window_is_longer_than_the_longest(self) -> None:
        windows, sinks = with_fewer_sinks([[5, 9], [3, 3]], 4, lambda w, s: float(sum(s)), longest=11)
        assert windows == [[7, 11], [7, 7]]
        assert sinks == [2, 0]

    @pytest.mark.parametrize(
        ("sinks", "tried"), [(0, []), (1, [0]), (4, [2, 1, 0]), (5, [2, 1, 0]), (8, [4, 2, 1, 0])]
    )
    def test_numbers_that_are_tried(self, sinks: int, tried: list[int]) -> None:
        assert fewer_sinks(sinks) == tried


def test_hull() -> None:
    assert hull(CURVES[2]) == [(2, 0.9), (8, 0.1), (16, 0.09)]
    assert hull({2: 0.5, 4: 0.7, 8: 0.2}) == [(2, 0.5), (8, 0.2)]  # noise: a larger window is no worse


def test_too_little() -> None:
    with pytest.raises(
        ConfigError, match=r"at least 6 window tokens over 3 heads, got 5: raise --state-bytes"
    ):
        share_windows(CURVES, 5)
    with pytest.raises(ConfigError, match="raise --state-bytes"):
        even_windows(4, 3)


def test_even() -> None:
    assert even_windows(4, 11) == [3, 3, 3, 2]


def test_costs() -> None:
    assert Costs(token=10, head=7, sinks=4).windows([1, 6]) == 150


@pytest.mark.parametrize(
    ("most", "least_share", "expected"),
    [(5, 0.0, [(1,), (0, 2)]), (2, 0.0, [(1,), (2,)]), (5, 0.5, [(1,), (2,)]), (1, 0.0, [(), (2,)])],
)
def test_heads(most: int, least_share: float, expected: list[tuple[int, ...]]) -> None:
    importance = [[0.0, 0.6, -0.2], [0.3, 0.0, 0.9]]
    assert chosen_heads(importance, most=most, least_share=least_share) == expected


@pytest.mark.parametrize(
    ("affordable", "expected"),
    [
        (800, (4, [(0,), (1,)])),  # both in need, as wide as there is
        (799, (2, [(0,), (1,)])),
        (200, (1, [(0,), (1,)])),
        (199, (1, [(), (1,)])),  # one of them, the narrowest
        (10, (1, [(), (1,)])),
    ],
)
def test_the_widest_states_that_all_in_need_can_have(affordable: int, expected: object) -> None:
    importance = [[0.5, 0.1], [0.0, 1.0]]
    assert widest_heads(importance, {1: 100, 2: 200, 4: 400}, affordable, least_share=0.25) == expected


def test_one_width_goes_to_as_many_heads_as_can_be_paid_for() -> None:
    importance = [[0.5, 0.1], [0.3, 1.0]]
    assert widest_heads(importance, {2: 200}, 500, least_share=0.25) == (2, [(0,), (1,)])
