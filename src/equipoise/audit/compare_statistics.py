"""The statistics of a comparison: intervals over seeds and documents, paired tests, Holm's correction.

Every run scored the same documents, so documents and seeds are crossed. A resample draws documents once,
for all runs alike (a bootstrap; figures of different runs stay paired by document), and each row's mean
over its seeds then moves by s / sqrt(n) times a draw of Student's t with n - 1 degrees of freedom, where s
is the standard deviation between its n seeds. Drawing seeds with replacement instead, as a plain
hierarchical bootstrap does, takes three values for the whole population: where seeds differ more than
documents do, intervals come out little more than a third as wide as they have to be, and in
tests/audit/test_compare.py's simulation 29% of null differences in NLL are found, not 3%. With one seed
nothing is known of other seeds, and the interval is over documents alone. Variation between seeds holds
some variation between documents, which is then counted twice: intervals err on the wide side.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.audit.attribution import DONOR, UNTRAINED, empty
from equipoise.audit.report import CONTROL
from equipoise.statistics import Draws, Estimate, Floats, ScoreTable, bootstrap, estimate

RESAMPLES = 10_000
"""Behind every interval and p-value; the smallest p-value they can give is 2e-4."""
Covers = Literal["seeds and documents", "documents"]


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that runs are compared by.

    Attributes:
        title: what tables call it.
        unit: `nats` or `share`; shares are shown in percent.
        best: whether high or low is good; None where neither is.
        needs: the branches a run must have for it to mean anything.
        draws: its value on every resample [1 + resamples].
        tested: whether pairs of rows are tested on it.
    """

    title: str
    unit: Literal["nats", "share"]
    best: Literal["high", "low"] | None
    needs: frozenset[str]
    draws: Callable[[Draws], Floats]
    tested: bool = False


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    undefined = np.full_like(numerator, np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)


def _recovered(state: str) -> Callable[[Draws], Floats]:
    return lambda draws: _ratio(draws[state] - draws["none"], draws[DONOR] - draws["none"])


def _linear_share(draws: Draws) -> Floats:
    """The linear branch's Shapley value over both branches', renormalised (`equipoise.audit.attribution`)."""
    both, none = draws["both"], draws[empty(draws)]
    window, linear = draws["window_renormalised"], draws["linear_renormalised"]
    return _ratio(0.5 * ((linear - none) + (both - window)), both - none)


_LINEAR, _BOTH, _ANY = frozenset({"linear"}), frozenset({"window", "linear"}), frozenset[str]()
MEASURES: Mapping[str, Measure] = {
    "nll": Measure("NLL", "nats", "low", _ANY, lambda d: -d["both"], tested=True),
    "recovered": Measure("both", "share", "high", _ANY, _recovered("both")),
    "window_alone": Measure(
        "window alone", "share", "high", frozenset({"window"}), _recovered("window_renormalised")
    ),
    "linear_alone": Measure(
        "linear alone", "share", "high", _LINEAR, _recovered("linear_renormalised"), tested=True
    ),
    "linear_nll": Measure("linear alone NLL", "nats", "low", _LINEAR, lambda d: -d["linear_renormalised"]),
    "untrained": Measure("linear alone, untrained maps", "share", None, _LINEAR, _recovered(UNTRAINED)),
    "linear_share": Measure("linear share", "share", "high", _BOTH, _linear_share, tested=True),
    "window_gap": Measure(
        "gain on window alone",
        "nats",
        "high",
        _BOTH,
        lambda d: d["both"] - d["window_renormalised"],
        tested=True,
    ),
    "control": Measure("gain on control", "nats", "high", _ANY, lambda d: d["both"] - d[CONTROL]),
}
"""In the order of the table. Recovered is 0 without attention and 1 at the donor; alone is at weight 1."""
CONTROL_MEASURE = "control"


@dataclass(frozen=True, slots=True)
class Value:
    """A row's figure: mean over seeds with its interval, and each seed's own value."""

    estimate: Estimate
    seeds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """A two-sided test of one difference.

    Attributes:
        measure: name in `MEASURES`.
        row, other: what is compared; `other` is None for a test against zero (the control).
        difference: row - other, with its interval, not corrected for multiple comparisons.
        p: the p-value on its own; None where the figure is undefined on a resample.
        p_holm: corrected among all tests of the same measure.
        seeds: how many seeds were paired with one another; 0 where rows share fewer than two.
        covers: what the p-value takes the variation of into account.
    """

    __test__ = False  # pytest: a result, not a test class

    measure: str
    row: str
    other: str | None
    difference: Estimate
    p: float | None
    p_holm: float | None
    seeds: int
    covers: Covers


@dataclass(frozen=True)
class RunScores:
    """One run: its seed, its per-document sums, and the branches it has."""

    seed: int
    table: ScoreTable
    branches: frozenset[str]


class Resampled:
    """All runs on the same resamples of their documents.

    Args:
        rows: runs by row; all tables hold the same documents.
        resamples: number of resamples.
        seed: of the resampling.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[RunScores]], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        self.rows = {name: sorted(runs, key=lambda run: run.seed) for name, runs in rows.items()}
        runs = [(name, run) for name, members in self.rows.items() for run in members]
        first = runs[0][1].table
        sums = {f"{name}\n{run.seed}\n{s}": v for name, run in runs for s, v in run.table.sums.items()}
        joint = ScoreTable(metric=first.metric, unit=first.unit, sums=sums, weights=first.weights)
        self._draws = bootstrap(joint, resamples=resamples, seed=seed)
        self._seed = seed

    def value(self, row: str, measure: str) -> Value | None:
        """A row's figure; None where it lacks the branch or the state."""
        per_seed = self._per_seed(row, measure)
        if per_seed is None:
            return None
        return Value(
            estimate(self._over_seeds(per_seed, measure, row)), tuple(float(v) for v in per_seed[:, 0])
        )

    def against_zero(self, row: str, measure: str) -> Test | None:
        """Whether a row's figure differs from zero; None where it has none."""
        per_seed = self._per_seed(row, measure)
        if per_seed is None:
            return None
        several = len(per_seed) > 1
        draws = self._over_seeds(per_seed, measure, row)
        return self._test(measure, row, None, draws, len(per_seed) if several else 0, several)

    def between(self, row: str, other: str, measure: str) -> Test | None:
        """Whether two rows differ, paired by document, and by seed where they share at least two."""
        one, two = self._per_seed(row, measure), self._per_seed(other, measure)
        if one is None or two is None:
            return None
        seeds = [[run.seed for run in self.rows[name]] for name in (row, other)]
        shared = sorted(set(seeds[0]) & set(seeds[1]))
        if len(shared) > 1:
            differences = one[[seeds[0].index(s) for s in shared]] - two[[seeds[1].index(s) for s in shared]]
            draws = self._over_seeds(differences, measure, row, other)
            return self._test(measure, row, other, draws, len(shared), True)
        draws = self._over_seeds(one, measure, row) - self._over_seeds(two, measure, other)
        return self._test(measure, row, other, draws, 0, min(len(one), len(two)) > 1)

    def _per_seed(self, row: str, measure: str) -> Floats | None:
        """[seeds, 1 + resamples], seeds in order."""
        wanted = MEASURES[measure]
        parts: list[Floats] = []
        for run in self.rows[row]:
            if not wanted.needs <= run.branches:
                return None
            scores = {state: self._draws[f"{row}\n{run.seed}\n{state}"] for state in run.table.sums}
            if not _has_states(measure, scores):
                return None
            parts.append(wanted.draws(Draws(metric=self._draws.metric, unit=self._draws.unit, scores=scores)))
        return np.stack(parts)

    def _over_seeds(self, per_seed: Floats, *what: str) -> Floats:
        """Mean over seeds [1 + resamples], its resamples spread as far as seeds differ.

        `what` it is of seeds the draws, so that no figure depends on which others were asked for before.
        """
        count, mean = len(per_seed), per_seed.mean(0)
        if count > 1:
            error = per_seed[:, 0].std(ddof=1) / count**0.5
            generator = np.random.default_rng((self._seed, zlib.crc32("\n".join(what).encode())))
            mean[1:] += error * generator.standard_t(count - 1, size=mean.size - 1)
        return mean

    @staticmethod
    def _test(measure: str, row: str, other: str | None, draws: Floats, seeds: int, over_seeds: bool) -> Test:
        return Test(
            measure=measure, row=row, other=other, difference=estimate(draws), p=p_value(draws), p_holm=None,
            seeds=seeds, covers="seeds and documents" if over_seeds else "documents",
        )  # fmt: skip


def p_value(draws: Floats) -> float | None:
    """Two-sided p-value of zero: twice the share of resamples on the rarer side of it (inverted interval).

    Never below 2 / (resamples + 1); None where a resample is undefined.
    """
    resampled = draws[1:]
    if not np.isfinite(resampled).all():
        return None
    rarer = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(resampled) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of any false finding stays below the level (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def _has_states(measure: str, scores: Mapping[str, Floats]) -> bool:
    optional = {"untrained": UNTRAINED, "control": CONTROL}
    return measure not in optional or optional[measure] in scores
