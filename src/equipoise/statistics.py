"""Scores with intervals: sums per document, a bootstrap over documents, estimates.

Documents are the clusters that the bootstrap resamples: tokens (or questions) of one document are not
independent, documents are. Everything here is numpy; no model is needed to recompute an interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

INTERVAL = 0.95
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

    With fewer than about 20 documents percentile intervals are too narrow, as any bootstrap's are.

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
    totals = np.vstack([columns.sum(axis=0, keepdims=True), _resampled_totals(columns, resamples, seed)])
    scores = totals[:, 1:] / totals[:, :1]
    by_state = {state: scores[:, index] for index, state in enumerate(states)}
    return Draws(metric=table.metric, unit=table.unit, scores=MappingProxyType(by_state))


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


def _resampled_totals(columns: Floats, resamples: int, seed: int) -> Floats:
    """Column sums of `resamples` resamplings of the rows of `columns` [documents, columns]."""
    rng = np.random.default_rng(seed)
    documents = len(columns)
    share = np.full(documents, 1 / documents)
    step = max(1, _COUNTS_AT_ONCE // documents)
    parts: list[Floats] = []
    for start in range(0, resamples, step):
        counts = rng.multinomial(documents, share, size=min(step, resamples - start))
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
