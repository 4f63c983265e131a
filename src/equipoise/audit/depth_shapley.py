"""Shapley values by sampling permutations, with their standard error and a stopping rule.

A game is a function of coalitions, sets of player numbers, to the summed score of each document. Marginals
are taken document by document, so a value has an interval over documents like any other score; sampling adds
its own standard error. Nothing here knows of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from equipoise.statistics import Floats

Coalition = frozenset[int]
Game = Callable[[Coalition], Floats]
Stop = Literal["exact", "tolerance", "budget"]

LEAST_PAIRS = 8
"""Pairs of permutations before a standard error is trusted; or as many as players, if that is more."""
MOST_PAIRS = 10_000
"""Pairs at most, where coalitions repeat and cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Shapley values of one game.

    Attributes:
        sums: mean marginal of each player, per document [players, documents]; summed over players they are
            the grand coalition's sums minus the empty one's.
        standard_errors: of each player's value, from the permutations alone [players]; 0 where exact.
        freedom: degrees of freedom of each standard error [players]; infinite where exact.
        pairs: antithetic pairs of permutations drawn; 0 where exact.
        evaluations: coalitions scored, the empty and the full one included.
        stopped_by: ``exact`` (every coalition scored), ``tolerance`` (every standard error below it) or
            ``budget``.
        efficiency_gap: |sum of the values - (v(all) - v(none))|; anything but rounding is a fault.
    """

    sums: Floats
    standard_errors: Floats
    freedom: Floats
    pairs: int
    evaluations: int
    stopped_by: Stop
    efficiency_gap: float

    @property
    def trusted(self) -> bool:
        """Whether enough pairs were drawn for the standard errors to mean what they say."""
        return self.stopped_by == "exact" or self.pairs >= least_pairs(len(self.sums))


def least_pairs(players: int) -> int:
    """Pairs of permutations before a standard error is trusted."""
    return max(LEAST_PAIRS, players)


def shapley(
    game: Game,
    players: int,
    weights: Floats,
    *,
    tolerance: float,
    budget: int,
    seed: int = 0,
) -> Sampled:
    """Shapley values: exact where that costs no more than the budget, else by antithetic permutations.

    Permutations come in pairs, one and its reverse: exact for games of pairwise interactions, and never
    dearer. A pair counts as one draw in the standard error. Where players stand in for one another, a small
    one counts only where it joins first, which few pairs show; so what each player adds to nobody and to
    everybody else is scored beforehand, and the standard error uses it: variance between those ends, whose
    share of the orders is known, and the middle, plus the variance within the middle. Without that, the 95%
    intervals of 8 pairs of 16 such players held the truth 80 times in 100.

    Sampling stops when `least_pairs` are drawn and
    the standard error of every value is at most `tolerance`, or when the next pair would need more coalitions
    scored than the budget has left. The ends and at least two pairs are scored whatever the budget, or there
    would be no standard error.

    Args:
        game: coalition -> summed score of each document [documents]; called once a coalition.
        players: how many; they are numbered from 0.
        weights: [documents]; a value is sum(sums) / sum(weights).
        tolerance: largest standard error wanted, in the score's unit.
        budget: coalitions to score at most, the empty and the full one not counted.
        seed: of the permutations.

    Raises:
        ValueError: no players, or a negative tolerance or budget.

    Source: Castro et al. 2009 (sampling), Mitchell et al. 2022, arXiv 2104.12199 (antithetic pairs).
    """
    if players < 1 or tolerance < 0 or budget < 0:
        raise ValueError(
            "expected at least one player, and a tolerance and a budget of 0 or more, got "
            f"{players}, {tolerance} and {budget}"
        )
    known: dict[Coalition, Floats] = {}

    def value(coalition: Coalition) -> Floats:
        if coalition not in known:
            known[coalition] = game(coalition)
        return known[coalition]

    empty, full = value(frozenset()), value(frozenset(range(players)))
    if 2**players - 2 <= max(budget, 2 * players):
        sums, pairs, stopped = _exact(value, players), 0, "exact"
        errors, freedom = np.zeros(players), np.full(players, np.inf)
    else:
        ends = _ends(value, players).sum(1) / weights.sum()
        draws, stopped = _sample(value, known, ends, weights, tolerance, budget, seed)
        sums, pairs = np.mean([draw.sums for draw in draws], axis=0), len(draws)
        errors, freedom = _errors(draws, ends)
    gap = abs(float((sums.sum(0) - (full - empty)).sum() / weights.sum()))
    return Sampled(
        sums=sums, standard_errors=errors, freedom=freedom, pairs=pairs,
        evaluations=len(known), stopped_by=stopped, efficiency_gap=gap,
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """One permutation and its reverse.

    Attributes:
        sums: marginals averaged over both [players, documents].
        values: the same as scores [players].
        middle: players who stand at neither end [players].
    """

    sums: Floats
    values: Floats
    middle: NDArray[np.bool_]


def _sample(
    value: Game,
    known: dict[Coalition, Floats],
    ends: Floats,
    weights: Floats,
    tolerance: float,
    budget: int,
    seed: int,
) -> tuple[list[_Pair], Stop]:
    rng, players = np.random.default_rng(seed), len(ends)
    spendable = budget + 2
    drawn: list[_Pair] = []
    while len(drawn) < MOST_PAIRS:
        order = [int(player) for player in rng.permutation(players)]
        orders = order, order[::-1]
        needed = {prefix for one in orders for prefix in _prefixes(one)} - known.keys()
        if len(drawn) >= 2 and len(known) + len(needed) > spendable:
            return drawn, "budget"
        sums = np.mean([_marginals(value, one) for one in orders], axis=0)
        middle = np.ones(players, dtype=np.bool_)
        middle[[order[0], order[-1]]] = False
        drawn.append(_Pair(sums, sums.sum(1) / weights.sum(), middle))
        if len(drawn) >= least_pairs(players) and _errors(drawn, ends)[0].max() <= tolerance:
            return drawn, "tolerance"
    return drawn, "budget"


def _errors(drawn: Sequence[_Pair], ends: Floats) -> tuple[Floats, Floats]:
    """Standard errors [players]: variance between ends and middle, whose shares are known, and within it.

    Beside them their degrees of freedom (Satterthwaite 1946): only what varies in the middle is estimated.
    """
    values = np.stack([pair.values for pair in drawn])
    middle = np.stack([pair.middle for pair in drawn])
    players, counts = len(ends), middle.sum(0)
    means = (values * middle).sum(0) / np.maximum(counts, 1)
    means = np.where(counts > 0, means, ends)
    within = ((values - means) ** 2 * middle).sum(0) / np.maximum(counts - 1, 1)
    share = 2 / players
    estimated = (1 - share) * within
    variance = share * (1 - share) * (ends - means) ** 2 + estimated
    known = np.divide(variance, estimated, out=np.full(players, np.inf), where=estimated > 0)
    return np.sqrt(variance / len(drawn)), known**2 * np.maximum(counts - 1, 1)


def _ends(value: Game, players: int) -> Floats:
    """What each player adds to nobody and to everybody else, averaged [players, documents]."""
    everybody = frozenset(range(players))
    nobody, all_of_them = value(frozenset()), value(everybody)
    gains = [
        (value(frozenset({player})) - nobody + all_of_them - value(everybody - {player})) / 2
        for player in range(players)
    ]
    return np.stack(gains)


def _prefixes(order: Sequence[int]) -> list[Coalition]:
    """The coalitions that a permutation builds, from none to all."""
    return [frozenset(order[:size]) for size in range(len(order) + 1)]


def _marginals(value: Game, order: Sequence[int]) -> Floats:
    """What each player adds when it joins in this order [players, documents]."""
    path = [value(coalition) for coalition in _prefixes(order)]
    gains = np.empty((len(order), len(path[0])))
    for player, (before, after) in zip(order, itertools.pairwise(path), strict=True):
        gains[player] = after - before
    return gains


def _exact(value: Game, players: int) -> Floats:
    """The definition: a weighted mean of marginals over all coalitions [players, documents]."""
    sums = np.zeros((players, len(value(frozenset()))))
    for player in range(players):
        others = [other for other in range(players) if other != player]
        for size in range(players):
            share = 1 / (players * math.comb(players - 1, size))
            for before in map(frozenset, itertools.combinations(others, size)):
                sums[player] += share * (value(before | {player}) - value(before))
    return sums
