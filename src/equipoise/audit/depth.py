"""Attribution in depth: a hybrid's score taken apart by layer and by head, for any metric.

Every figure is a difference between two sets of pieces that run (`equipoise.audit.depth_units`), with a 95%
interval over documents. Where draws of permutations or of layers are in it as well, their own standard error
widens the interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from equipoise.audit.attribution import READINGS
from equipoise.audit.depth_shapley import Coalition, Stop, shapley
from equipoise.audit.depth_units import (
    BRANCH_NAMES,
    BranchName,
    Score,
    Scorer,
    Unit,
    head_units,
    layer_units,
)
from equipoise.ops.types import Reading
from equipoise.statistics import Estimate, Floats, bootstrap, widened
from equipoise.statistics import score as score_of

GameName = Literal["window", "linear", "all"]
Comparison = Literal["more", "less", "no clear difference"]
Stage = Callable[[str, int], None]
"""Called as each part of the work begins, with its name and how many sets it scores at most."""


@dataclass(frozen=True, kw_only=True)
class DepthSettings:
    """What to take apart, and how finely.

    Attributes:
        metric, unit: what the score is, in words.
        heads: whether to go down to heads, 4 sets a head and reading.
        readings: how the survivor of an ablated branch is read.
        games: whose Shapley values over layers: ``linear`` (the window runs everywhere), ``window`` (the
            linear branch runs everywhere), ``all`` (both branches of every layer are players).
        tolerance: sampling stops when the standard error of every value is at most this share of
            |v(both) - v(none)|.
        budget: sets scored for one game and reading at most (`equipoise.audit.depth_shapley.shapley`).
        draws: random sets of the random-layer control.
        seed: of permutations, random sets and the bootstrap.
        resamples: of the bootstrap.
    """

    metric: str = "nll"
    unit: str = "nats/token"
    heads: bool = True
    readings: Sequence[Reading] = READINGS
    games: Sequence[GameName] = ("window", "linear")
    tolerance: float = 0.01
    budget: int = 500
    draws: int = 8
    seed: int = 0
    resamples: int = 2000


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one piece does.

    Attributes:
        unit, reading: which piece, and how the survivor is read.
        cost: v(both) - v(all but this piece), positive where the hybrid loses.
        gain: v(of this branch, this piece alone) - v(none of this branch), the other branch whole.
    """

    unit: Unit
    reading: Reading
    cost: Estimate
    gain: Estimate


@dataclass(frozen=True, kw_only=True)
class LayerShapley:
    """Shapley values of one game over layers.

    Attributes:
        game, reading: see `DepthSettings.games`.
        players: the branches that play, in the order of `values`.
        values: with intervals over documents and permutations together.
        standard_errors: from the permutations alone; 0 where exact.
        total: v(both) - v(no player), what the values add up to.
        pairs, evaluations, stopped_by, trusted, efficiency_gap: see `equipoise.audit.depth_shapley.Sampled`.
        tolerance: the standard error that would stop the sampling, in the metric's unit.
    """

    game: GameName
    reading: Reading
    players: Sequence[Unit]
    values: Sequence[Estimate]
    standard_errors: Sequence[float]
    total: Estimate
    pairs: int
    evaluations: int
    stopped_by: Stop
    trusted: bool
    efficiency_gap: float
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class RandomControl:
    """Removing one branch everywhere, beside removing as many random branches of layers.

    Attributes:
        branch, reading: which branch, and how the survivor is read.
        removed: how many pieces go, of `units`.
        units: branches of layers there are.
        cost: v(both) - v(without the branch).
        draws: v(both) - v(without a random set), one for each set, all sets different and none of them one
            whole branch.
        excess: cost less the mean of the draws; None where there are no such sets.
        answer: whether removing the branch costs more or less than removing random pieces, by the interval.
    """

    branch: BranchName
    reading: Reading
    removed: int
    units: int
    cost: Estimate
    draws: Sequence[float]
    excess: Estimate | None
    answer: Comparison | None


@dataclass(frozen=True, kw_only=True)
class Depth:
    """A hybrid taken apart.

    Attributes:
        settings: what was asked for.
        documents, weight: how many were scored, and their summed weight (tokens, items).
        states: the score in the states all the rest refers to: `both`, `none`, and `without window` and
            `without linear` in each reading.
        layers, heads: every piece's effect; no heads where they were not asked for.
        shapley, control: as named.
        evaluations: sets scored in all.
    """

    settings: DepthSettings
    documents: int
    weight: float
    states: Mapping[str, Estimate]
    layers: Sequence[Effect]
    heads: Sequence[Effect]
    shapley: Sequence[LayerShapley]
    control: Sequence[RandomControl]
    evaluations: int


def attribute_depth(
    model: nn.Module,
    score: Score,
    settings: DepthSettings | None = None,
    *,
    stage: Stage = lambda name, sets: None,
    on_score: Callable[[], None] = lambda: None,
) -> Depth:
    """Take a hybrid's score apart.

    Args:
        model: converted.
        score: any metric, see `equipoise.audit.depth_units.Score`; `likelihood` is the audit's.
        settings: None for the defaults.
        stage: told what comes next.
        on_score: called after each set that was scored; sets that were known already are not scored again.

    Raises:
        ConversionError: the model is not converted.
        ValueError: a score of fewer than two documents, not finite, or of changing weights.
    """
    chosen = settings or DepthSettings()
    work = _Work(Scorer(model, score, on_score), chosen, layer_units(model))
    stage("states", 2 + 2 * len(chosen.readings))
    states = work.states()
    stage("layers", work.sets_of(work.units))
    layers = work.effects(work.units)
    heads: list[Effect] = []
    if chosen.heads:
        pieces = head_units(model)
        stage("heads", work.sets_of(pieces))
        heads = work.effects(pieces)
    values: list[LayerShapley] = []
    for game, reading in itertools.product(chosen.games, chosen.readings):
        players = work.players(game)
        if players:
            stage(f"Shapley values, {game}, {reading}", min(2 ** len(players), chosen.budget + 2))
            values.append(work.shapley(game, players, reading))
    stage("random layers", 2 * chosen.draws * len(chosen.readings))
    control = work.control() if len(work.branches) == 2 else []
    assert work.scorer.weights is not None
    return Depth(
        settings=chosen, documents=len(work.scorer.weights), weight=float(work.scorer.weights.sum()),
        states=states, layers=layers, heads=heads, shapley=values, control=control,
        evaluations=len(work.scorer.sums),
    )  # fmt: skip


class _Work:
    """One model under one score.

    Attributes:
        scorer: of sets of pieces that are off.
        units: every branch of every layer.
        branches: those that the model has.
    """

    def __init__(self, scorer: Scorer, settings: DepthSettings, units: Sequence[Unit]) -> None:
        self.scorer, self.settings, self.units = scorer, settings, list(units)
        self.branches: list[BranchName] = [
            name for name in BRANCH_NAMES if any(unit.branch == name for unit in units)
        ]

    def all_of(self, branch: BranchName) -> frozenset[Unit]:
        """The branch in every layer."""
        return frozenset(unit for unit in self.units if unit.branch == branch)

    def players(self, game: GameName) -> list[Unit]:
        """The pieces that play."""
        return [unit for unit in self.units if game == "all" or unit.branch == game]

    def sets_of(self, pieces: Sequence[Unit]) -> int:
        """How many sets `effects` scores at most."""
        return 2 * len(pieces) * len(self.settings.readings)

    def estimates(self, sums: Mapping[str, Floats]) -> dict[str, Estimate]:
        """Score, or difference of scores, with its interval; all share their resamples."""
        if not sums:
            return {}
        table = self.scorer.table(dict(sums), metric=self.settings.metric, unit=self.settings.unit)
        draws = bootstrap(table, resamples=self.settings.resamples, seed=self.settings.seed)
        return {name: score_of(draws, name) for name in sums}

    def states(self) -> dict[str, Estimate]:
        """The states everything refers to."""
        sums = {"both": self.scorer((), "literal"), "none": self.scorer(self.units, "literal")}
        for branch, reading in itertools.product(self.branches, self.settings.readings):
            sums[f"without {branch}, {reading}"] = self.scorer(self.all_of(branch), reading)
        return self.estimates(sums)

    def effects(self, pieces: Sequence[Unit]) -> list[Effect]:
        """Each piece ablated in the whole hybrid, and restored alone."""
        contrasts: dict[str, Floats] = {}
        cases = list(itertools.product(self.settings.readings, pieces))
        for reading, piece in cases:
            whole = self.all_of(piece.branch)
            others = [one for one in pieces if one.branch == piece.branch and one != piece]
            name = f"{reading} {piece}"
            contrasts[f"cost {name}"] = self._both() - self.scorer([piece], reading)
            contrasts[f"gain {name}"] = self.scorer(others, reading) - self.scorer(whole, reading)
        found = self.estimates(contrasts)
        return [
            Effect(
                unit=piece, reading=reading, cost=found[f"cost {reading} {piece}"],
                gain=found[f"gain {reading} {piece}"],
            )
            for reading, piece in cases
        ]  # fmt: skip

    def _both(self) -> Floats:
        return self.scorer((), "literal")

    def shapley(self, game: GameName, players: Sequence[Unit], reading: Reading) -> LayerShapley:
        """One game over layers."""
        settings, nobody = self.settings, self.scorer(players, reading)
        both, none = self._both(), self.scorer(self.units, "literal")
        tolerance = settings.tolerance * abs(self.scorer.value(both - none))

        def sums_of(coalition: Coalition) -> Floats:
            return self.scorer([p for index, p in enumerate(players) if index not in coalition], reading)

        assert self.scorer.weights is not None
        found = shapley(
            sums_of, len(players), self.scorer.weights, tolerance=tolerance, budget=settings.budget,
            seed=settings.seed,
        )  # fmt: skip
        values = self.estimates({str(player): found.sums[index] for index, player in enumerate(players)})
        return LayerShapley(
            game=game, reading=reading, players=tuple(players),
            values=[
                widened(values[str(player)], float(error), freedom=float(freedom))
                for player, error, freedom in zip(
                    players, found.standard_errors, found.freedom, strict=True
                )
            ],
            standard_errors=[float(error) for error in found.standard_errors],
            total=self.estimates({"total": both - nobody})["total"], pairs=found.pairs,
            evaluations=found.evaluations, stopped_by=found.stopped_by, trusted=found.trusted,
            efficiency_gap=found.efficiency_gap, tolerance=tolerance,
        )  # fmt: skip

    def control(self) -> list[RandomControl]:
        """Both branches beside random sets of as many pieces."""
        return [
            self._beside_random(branch, reading)
            for branch, reading in itertools.product(self.branches, self.settings.readings)
        ]

    def _beside_random(self, branch: BranchName, reading: Reading) -> RandomControl:
        whole, settings = self.all_of(branch), self.settings
        pure = [self.all_of(name) for name in self.branches]
        sets = random_sets(self.units, len(whole), settings.draws, avoid=pure, seed=settings.seed)
        cost = self._both() - self.scorer(whole, reading)
        costs = [self._both() - self.scorer(one, reading) for one in sets]
        draws = [self.scorer.value(one) for one in costs]
        excess = answer = None
        if draws:
            excess = self.estimates({"excess": cost - np.mean(costs, axis=0)})["excess"]
            # no error of the draws where there are no other sets to draw
            if len(draws) > 1 and len(draws) < math.comb(len(self.units), len(whole)) - len(pure):
                error = float(np.std(draws, ddof=1)) / math.sqrt(len(draws))
                excess = widened(excess, error, freedom=float(len(draws) - 1))
            low, high = excess.ci95
            answer = "more" if low > 0 else "less" if high < 0 else "no clear difference"
        return RandomControl(
            branch=branch, reading=reading, removed=len(whole), units=len(self.units),
            cost=self.estimates({"cost": cost})["cost"], draws=draws, excess=excess, answer=answer,
        )  # fmt: skip


def random_sets(
    units: Sequence[Unit], size: int, count: int, *, avoid: Collection[frozenset[Unit]], seed: int
) -> list[frozenset[Unit]]:
    """Different random sets of so many pieces, as many as asked for or as there are.

    Args:
        units: to draw from.
        size: pieces in a set.
        count: sets wanted.
        avoid: sets that do not count as random.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    wanted = min(count, math.comb(len(units), size) - len(set(avoid)))
    found: list[frozenset[Unit]] = []
    while len(found) < wanted:
        drawn = frozenset(units[int(index)] for index in rng.choice(len(units), size, replace=False))
        if drawn not in avoid and drawn not in found:
            found.append(drawn)
    return found
