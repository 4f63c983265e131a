"""The table of a benchmark run: scores by branch state and task, what is recovered of the donor's, intervals.

A column's score is a mean over documents, or over the tasks of a group. Intervals are 95% percentile
bootstraps over documents, the same documents for every state, so that states are compared in pairs; what
averages over tasks resamples within each of them. Recovered is score / donor, as published; above chance, it
is (score - chance) / (donor - chance), since guessing alone already "recovers" half of many averages.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from equipoise.evaluate.entries import Aggregate, Entry
from equipoise.evaluate.failures import HarnessError
from equipoise.evaluate.scores import MetricScores, StateScores, TaskScores
from equipoise.evaluate.states import DONOR
from equipoise.registry import unknown_name
from equipoise.statistics import Draws, Estimate, Floats, ScoreTable, bootstrap, estimate

CHANCE = "chance"
"""Guessing, kept as one more state, so that it is resampled with the documents."""
PUBLISHED = MappingProxyType({"arc_challenge": "acc_norm", "hellaswag": "acc_norm"})
"""Metrics other than acc that the published tables (arXiv 2410.10254, 2510.05901) take."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One score of the table.

    Attributes:
        label: heading.
        entry: the task or group asked for.
        parts: (task, lm-eval's `metric,filter`) of each task in it.
        by_size: whether its tasks weigh by their documents rather than equally.
        share: its weight in the average; those of one entry sum to 1.
        is_group: whether it is a group's.
    """

    label: str
    entry: str
    parts: tuple[tuple[str, str], ...]
    by_size: bool = False
    share: float = 1.0
    is_group: bool = False

    @property
    def metric(self) -> str:
        """Name of its metric; with the filter where there is a choice of them."""
        return self.parts[0][1].removesuffix(",none")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One branch state.

    Attributes:
        scores: by column label.
        average: over entries, each counting once.
        recovered: average / donor's average; None without a donor.
        recovered_above_chance: the same after subtracting chance from both.
        below_donor, below_both: the donor's average, or the hybrid's, minus this one; None where not run.
    """

    scores: Mapping[str, Estimate]
    average: Estimate
    recovered: Estimate | None
    recovered_above_chance: Estimate | None
    below_donor: Estimate | None
    below_both: Estimate | None


@dataclass(frozen=True, kw_only=True)
class BenchmarkTable:
    """The whole table.

    Attributes:
        columns: in the order asked for.
        rows: by state.
        chance: score of guessing by column label.
        average_chance: of the average.
    """

    columns: tuple[Column, ...]
    rows: Mapping[str, Row]
    chance: Mapping[str, float]
    average_chance: float


def benchmark_table(
    entries: Sequence[Entry],
    states: Mapping[str, StateScores],
    *,
    metrics: Mapping[str, str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> BenchmarkTable:
    """Put scores of single documents together.

    Args:
        entries: what was asked for.
        states: scores by the state's name; `softmax` is the donor.
        metrics: lm-eval's metric to show for a task; by default the published one, else acc, else its first.
        resamples, seed: of the bootstrap.

    Raises:
        UnknownNameError: a metric that a task does not have, or a task that was not run.
        HarnessError: states that did not see the same documents.
    """
    check_same_documents(states)
    first = next(iter(states.values())).tasks
    columns = tuple(column for entry in entries for column in columns_of(entry, first, metrics or {}))
    known = {task for entry in entries for task in (entry.name, *entry.tasks)}
    for task in metrics or {}:
        if task not in known:
            raise unknown_name("task in --metric", task, known)
    drawn = {column.label: _draws(column, states, resamples, seed) for column in columns}
    average = _mean([drawn[column.label] for column in columns], [column.share for column in columns])
    rows = {name: _row(name, columns, drawn, average) for name in states}
    return BenchmarkTable(
        columns=columns, rows=rows, average_chance=float(average[CHANCE][0]),
        chance={label: float(draws[CHANCE][0]) for label, draws in drawn.items()},
    )  # fmt: skip


def check_same_documents(states: Mapping[str, StateScores]) -> None:
    """Raise unless every state answered the same prompts.

    Raises:
        HarnessError: they differ.
    """
    (name, first), *others = states.items()
    for other, scores in others:
        for task, known in first.tasks.items():
            if task not in scores.tasks or scores.tasks[task].documents != known.documents:
                raise HarnessError(
                    f"task {task}: states {name} and {other} did not see the same prompts, so they cannot be "
                    "compared. Did its data change between runs? Remove the stored scores and run again."
                )


def columns_of(entry: Entry, tasks: Mapping[str, TaskScores], metrics: Mapping[str, str]) -> list[Column]:
    """The columns of an entry: one, or one for each length that a RULER task was run at.

    Raises:
        UnknownNameError: a metric that it does not have.
    """
    if entry.is_group:
        return _group_columns(entry, tasks, metrics)
    available = tasks[entry.name].metrics
    lengths = sorted((name for name in available if name.partition(",")[0].isdigit()), key=_length)
    if lengths and entry.name not in metrics:
        return [
            Column(label=f"{entry.name}@{_length(name)}", entry=entry.name, parts=((entry.name, name),),
                   share=1 / len(lengths))
            for name in lengths
        ]  # fmt: skip
    wanted = metrics.get(entry.name)
    metric = _chosen(entry.name, wanted, available)
    return [Column(label=entry.name, entry=entry.name, parts=((entry.name, metric),))]


def _length(name: str) -> int:
    return int(name.partition(",")[0])


def _chosen(task: str, wanted: str | None, available: Mapping[str, MetricScores]) -> str:
    if wanted is not None:
        found = _first(available, wanted, ())
        if found is None:
            raise unknown_name(f"metric of {task}", wanted, available)
        return found
    preferred = (PUBLISHED.get(task, "acc"), "acc")
    named = (_first(available, metric, ()) for metric in preferred)
    return next((name for name in named if name is not None), next(iter(available)))


def _first(available: Mapping[str, MetricScores], metric: str, filters: Sequence[str]) -> str | None:
    """The first `metric,filter` of a metric, or the very one where a filter is named."""
    if metric in available:
        return metric
    for name in available:
        own, _, chosen = name.partition(",")
        if own == metric and (not filters or chosen in filters):
            return name
    return None


def _group_columns(entry: Entry, tasks: Mapping[str, TaskScores], metrics: Mapping[str, str]) -> list[Column]:
    lengths = [aggregate for aggregate in entry.aggregates if aggregate.metric.isdigit()]
    if lengths and entry.name not in metrics:
        return _length_columns(entry, tasks, by_size=lengths[0].by_size)
    wanted = metrics.get(entry.name)
    aggregate = entry.aggregates[0]
    if wanted is not None:
        named = {each.metric: each for each in entry.aggregates}
        aggregate = named.get(wanted, Aggregate(metric=wanted, by_size=aggregate.by_size))
    found = {task: _first(tasks[task].metrics, aggregate.metric, aggregate.filters) for task in entry.tasks}
    parts = tuple((task, name) for task, name in found.items() if name is not None)
    if not parts:
        known = {name for task in entry.tasks for name in tasks[task].metrics}
        raise unknown_name(f"metric of {entry.name}", aggregate.metric, known)
    return [Column(label=entry.name, entry=entry.name, parts=parts, by_size=aggregate.by_size, is_group=True)]


def _length_columns(entry: Entry, tasks: Mapping[str, TaskScores], *, by_size: bool) -> list[Column]:
    names = {name for task in entry.tasks for name in tasks[task].metrics}
    lengths = sorted((name for name in names if name.partition(",")[0].isdigit()), key=_length)
    return [
        Column(
            label=f"{entry.name}@{_length(name)}", entry=entry.name, by_size=by_size, share=1 / len(lengths),
            is_group=True, parts=tuple((task, name) for task in entry.tasks if name in tasks[task].metrics),
        )
        for name in lengths
    ]  # fmt: skip


# ---- statistics


def score_table(task: str, metric: str, states: Mapping[str, StateScores]) -> ScoreTable:
    """Sums of each document that the metric covers, by state; guessing is the state `chance`."""
    known = {name: scores.tasks[task].metrics[metric] for name, scores in states.items()}
    first = next(iter(known.values()))
    covered = first.weights > 0
    sums: dict[str, Floats] = {name: scores.sums[covered] for name, scores in known.items()}
    return ScoreTable(
        metric=f"{task} {metric}", unit="share", sums={**sums, CHANCE: first.chance[covered]},
        weights=first.weights[covered],
    )  # fmt: skip


def _draws(column: Column, states: Mapping[str, StateScores], resamples: int, seed: int) -> Draws:
    """Draws of a column; those of one task are the same whatever column or run it stands in."""
    tables = [score_table(task, metric, states) for task, metric in column.parts]
    seeds = [zlib.crc32(f"{seed} {task}".encode()) for task, _ in column.parts]
    drawn = [
        bootstrap(table, resamples=resamples, seed=each) for table, each in zip(tables, seeds, strict=True)
    ]
    return _mean(drawn, [float(table.documents) if column.by_size else 1.0 for table in tables])


def _mean(drawn: Sequence[Draws], weights: Sequence[float]) -> Draws:
    """Weighted mean of draws that were resampled independently of one another."""
    total = sum(weights)
    scores: dict[str, Floats] = {
        state: sum((draws[state] * (weight / total) for draws, weight in zip(drawn, weights, strict=True)),
                   start=np.zeros_like(drawn[0][state]))
        for state in drawn[0].scores
    }  # fmt: skip
    return Draws(metric="average", unit="share", scores=MappingProxyType(scores))


def _row(name: str, columns: Sequence[Column], drawn: Mapping[str, Draws], average: Draws) -> Row:
    own, chance = average[name], average[CHANCE]
    donor = average[DONOR] if DONOR in average.scores else None
    both = average["both"] if "both" in average.scores else None
    return Row(
        scores={column.label: estimate(drawn[column.label][name]) for column in columns},
        average=estimate(own),
        recovered=None if donor is None else estimate(_ratio(own, donor)),
        recovered_above_chance=None if donor is None else estimate(_ratio(own - chance, donor - chance)),
        below_donor=None if donor is None else estimate(donor - own),
        below_both=None if both is None else estimate(both - own),
    )


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise ratio; NaN where the donor does not beat what it is measured from."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
