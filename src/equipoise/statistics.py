"""Scores with intervals: sums per document, a bootstrap over documents, estimates.

Documents are the clusters that the bootstrap resamples: tokens (or questions) of one document are not
independent, documents are. Its resamples are smaller than the sample, so that 95% intervals cover about 95%
with tens of documents of uneven length too (docs/adr/0007). Everything here is numpy; no model is needed to
recompute an interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

INTERVAL = 0.95
_NORMAL_QUANTILE = NormalDist().inv_cdf((1 + INTERVAL) / 2)
# The bootstrap holds this many resampling counts at a time, so memory stays flat however many documents there
# are.
_COUNTS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95% percentile interval, in the value's own unit.

    NaN stands for *undefined* (a ratio whose denominator is not positive). An interval is undefined as soon
    as one resample is: dropping such resamples would make it look narrower than it is.
    """

    value: float
    ci95: tuple[float, float]

    @property
    def defined(self) -> bool:
        """Whether the value and both bounds are finite."""
        return bool(np.isfinite([self.value, *self.ci95]).all())

    def __neg__(self) -> Estimate:
        """The estimate of the negated quantity: an NLL from a score, say."""
        low, high = self.ci95
        return Estimate(-self.value, (-high, -low))


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Per-document score sums of every state measured; the score of a state is sum(sums) / sum(weights).

    Attributes:
        metric: short name of the metric, for instance `nll`.
        unit: unit of one score, for instance `nats/token`.
        sums: state -> [documents] float64, the document's summed score. Higher is better.
        weights: [documents] float64, what the sums are divided by: tokens, or items.

    Raises:
        ValueError: fewer than two documents, no state, unequal lengths, or values that are not finite.
    """

    metric: str
    unit: str
    sums: Mapping[str, Floats]
    weights: Floats

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        if not self.sums:
            raise ValueError("expected the sums of at least one state, got none")
        for state, sums in self.sums.items():
            _check_sums(state, sums, documents=len(self.weights))

    @classmethod
    def from_nll(cls, nll_sum: Mapping[str, ArrayLike], tokens: ArrayLike) -> ScoreTable:
        """A table from summed negative log-likelihoods (nats) and token counts, both per document."""
        sums = {state: -np.asarray(values, dtype=np.float64) for state, values in nll_sum.items()}
        weights = np.asarray(tokens, dtype=np.float64)
        return cls(metric="nll", unit="nats/token", sums=MappingProxyType(sums), weights=weights)

    @property
    def documents(self) -> int:
        """Number of documents, the clusters of the bootstrap."""
        return len(self.weights)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Scores of every state on the full sample and on every bootstrap resample.

    `scores[state]` is [1 + resamples]: element 0 is the full sample. All states share one resampling of the
    documents, so any arithmetic between them is paired, and a derived statistic is written once for both
    purposes.
    """

    metric: str
    unit: str
    scores: Mapping[str, Floats]

    def __getitem__(self, state: str) -> Floats:
        if state not in self.scores:
            raise KeyError(
                f"expected a measured state, one of {sorted(self.scores)}, got {state!r}; measure it first"
            )
        return self.scores[state]

    @property
    def resamples(self) -> int:
        """Number of bootstrap resamples."""
        return len(next(iter(self.scores.values()))) - 1


def bootstrap(table: ScoreTable, *, resamples: int = 2000, seed: int = 0) -> Draws:
    """Resample documents with replacement, the same documents for every state.

    A resample draws `resample_size` documents, fewer than there are: resamples of full size spread too little
    where few documents carry most of the weight, and 95% intervals then cover as little as 90%. With fewer
    than about 20 documents (`effective_documents`) no bootstrap's intervals are to be trusted.

    Args:
        table: the per-document sums.
        resamples: number of resamples; 2000 settles a 95% interval to about a percent of its width.
        seed: the resampling's seed; equal seeds and tables give equal intervals.

    Raises:
        ValueError: `resamples` is not positive.
    """
    if resamples < 1:
        raise ValueError(f"expected resamples >= 1, got {resamples}; 2000 is the default")
    states = list(table.sums)
    columns = np.column_stack([table.weights, *(table.sums[state] for state in states)])
    resampled = _resampled_totals(columns, resamples, seed, size=resample_size(table.weights))
    totals = np.vstack([columns.sum(axis=0, keepdims=True), resampled])
    scores = totals[:, 1:] / totals[:, :1]
    by_state = {state: scores[:, index] for index, state in enumerate(states)}
    return Draws(metric=table.metric, unit=table.unit, scores=MappingProxyType(by_state))


def effective_documents(weights: Floats) -> float:
    """How many documents of equal weight would carry the variance as these do: sum w^2 sum w / sum w^3.

    The number of documents where all weigh the same, 1 where one outweighs all others. It is the inverse of
    the documents' mean share of the weight, each document counted by its part in the variance (the square of
    its weight).

    Args:
        weights: [documents], positive.
    """
    shares = weights / weights.sum()
    return float((shares**2).sum() / (shares**3).sum())


def resample_size(weights: Floats) -> int:
    """How many documents a resample draws, at least 2, so that percentile intervals have the right width.

    Drawing m of n documents instead of n widens an interval by sqrt(n / m). What is wanted is, with N
    effective documents, Student's quantile over the normal one, t(N - 1) / z, and 1 / (1 - 1 / N), since a
    score that is fitted to the same documents leaves residuals too small: Hesterberg 2015 (section 4.2.3) for
    equal weights, with the jackknife's correction for leverage (MacKinnon and White 1985) for uneven ones.
    """
    count, effective = len(weights), effective_documents(weights)
    factor = student_quantile(effective - 1) / _NORMAL_QUANTILE / max(1 - 1 / effective, 0.5)
    return max(2, min(count, math.floor(count / factor**2)))


def student_quantile(freedom: float) -> float:
    """The upper 2.5% point of Student's t; an expansion around the normal's, 0.1% off at 3 degrees of
    freedom.

    Fewer than 1 degree of freedom counts as 1 (11% off there).

    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    z, degrees = _NORMAL_QUANTILE, max(1.0, freedom)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def estimate(draws: Floats) -> Estimate:
    """Value and percentile interval of a statistic computed on `Draws`.

    `draws` is [1 + resamples], element 0 the full sample; the result has the statistic's own unit.
    """
    value = float(draws[0])
    if not np.isfinite(draws[1:]).all():
        return Estimate(value, (float("nan"), float("nan")))
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(draws[1:], [tail, 1 - tail])
    return Estimate(value, (float(low), float(high)))


def score(draws: Draws, state: str) -> Estimate:
    """v(state), in the metric's unit; for `nll` its negation is the NLL in nats per token."""
    return estimate(draws[state])


def difference(draws: Draws, state: str, other: str) -> Estimate:
    """v(state) - v(other), paired, in the metric's unit; positive means that `state` is better."""
    return estimate(draws[state] - draws[other])


def widened(value: Estimate, standard_error: float, *, freedom: float) -> Estimate:
    """The estimate with a second, independent source of error in its interval, added in quadrature.

    Args:
        value: with the interval over documents.
        standard_error: of the other source (drawn permutations, drawn layers), in the value's unit.
        freedom: its degrees of freedom.
    """
    other = student_quantile(freedom) * standard_error
    low, high = value.ci95
    return Estimate(
        value.value,
        (
            value.value - math.hypot(value.value - low, other),
            value.value + math.hypot(high - value.value, other),
        ),
    )


def _resampled_totals(columns: Floats, resamples: int, seed: int, *, size: int) -> Floats:
    """Column sums of `resamples` resamplings, `size` of the rows of `columns` [documents, columns] each."""
    rng = np.random.default_rng(seed)
    documents = len(columns)
    step = max(1, _COUNTS_AT_ONCE // documents)
    parts: list[Floats] = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(documents, size=(rows, size)) + documents * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents)
        parts.append(counts.astype(np.float64) @ columns)
    return np.vstack(parts)


def _check_weights(weights: Floats) -> None:
    if weights.ndim != 1 or len(weights) < 2:
        raise ValueError(
            f"expected weights of at least two documents, got shape {weights.shape}; intervals resample "
            "documents, so split the text into several"
        )
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(
            "expected a positive, finite weight for every document; drop documents without scored tokens"
        )


def _check_sums(state: str, sums: Floats, *, documents: int) -> None:
    if sums.shape != (documents,):
        raise ValueError(
            f"expected {documents} sums for state {state!r}, got shape {sums.shape}; score every state on "
            "the same documents"
        )
    if not np.isfinite(sums).all():
        raise ValueError(
            f"expected finite sums for state {state!r}, got {int((~np.isfinite(sums)).sum())} that are not; "
            "the model diverges in that state: evaluate in float32, and check the training run"
        )
