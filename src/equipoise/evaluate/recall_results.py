"""From answers to figures: score tables, recall within and beyond reach, curves over distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from equipoise.evaluate.recall_examples import Example, Item
from equipoise.evaluate.recall_running import CONTROL, Answers, Sight, Tick, items_of, run_state, sight
from equipoise.evaluate.recall_text import RecallError
from equipoise.statistics import Estimate, ScoreTable, bootstrap, difference, score

Kept = NDArray[np.bool_]

BINS = 9
_UNDEFINED = (float("nan"), float("nan"))


@dataclass(frozen=True)
class RecallRun:
    """One model's answers.

    Attributes:
        name, seed: recipe and seed of the model, or its directory's name and 0.
        answers: by state.
        sights: how far each state sees.
    """

    name: str
    seed: int
    answers: Mapping[str, Answers]
    sights: Mapping[str, Sight]


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds, asked the same."""

    name: str
    examples: Sequence[Example]
    runs: Sequence[RecallRun]

    @property
    def states(self) -> tuple[str, ...]:
        """The states that every run has."""
        return tuple(s for s in self.runs[0].answers if all(s in run.answers for run in self.runs))

    @property
    def sights(self) -> Mapping[str, Sight]:
        """How far each state sees: one for all seeds."""
        return self.runs[0].sights


@dataclass(frozen=True)
class Recall:
    """Share of items answered rightly.

    Attributes:
        estimate: mean over seeds, with a 95% bootstrap interval over documents; NaN without an item.
        items: how many of each seed.
        seeds: each seed's own share.
    """

    estimate: Estimate
    items: int
    seeds: tuple[float, ...]

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest of the seeds."""
        return (min(self.seeds), max(self.seeds)) if self.seeds else _UNDEFINED

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "value": self.estimate.value, "ci95": list(self.estimate.ci95), "items": self.items,
            "seeds": list(self.seeds),
        }  # fmt: skip


def evaluate_recall(
    model: PreTrainedModel,
    examples: Sequence[Example],
    states: Sequence[str],
    *,
    name: str,
    seed: int,
    batch_size: int = 8,
    tick: Tick = lambda: None,
) -> RecallRun:
    """Ask a model everything in every state."""
    answers = {s: run_state(model, examples, s, batch_size=batch_size, tick=tick) for s in states}
    return RecallRun(name, seed, answers, {state: sight(model, state) for state in states})


def grouped(runs: Sequence[RecallRun], examples: Sequence[Example]) -> list[Group]:
    """Runs by name, in order of first appearance; those that see unequally far stay apart.

    Raises:
        RecallError: no runs.
    """
    if not runs:
        raise RecallError("expected at least one model, got none")
    found: dict[tuple[Any, ...], list[RecallRun]] = {}
    for run in runs:
        found.setdefault((run.name, tuple(run.sights.items())), []).append(run)
    return [Group(key[0], examples, members) for key, members in found.items()]


# ---- tables and estimates


def score_table(
    examples: Sequence[Example], answers: Mapping[str, NDArray[np.float64]], keep: Kept | None = None
) -> ScoreTable:
    """Right answers summed by document: what `equipoise.statistics` and the audit's attribution work on.

    Args:
        examples: what was asked.
        answers: state -> [items], 1 where right (or a mean over seeds).
        keep: [items], those that count; all where None.

    Raises:
        ValueError: fewer than two documents with an item that counts.
    """
    items = items_of(examples)
    kept = np.ones(len(items), bool) if keep is None else keep
    clusters = np.array([example.cluster for example, _ in items])[kept]
    documents = sorted(set(clusters.tolist()))
    row = np.searchsorted(np.array(documents), clusters)

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(row, weights=values[kept], minlength=len(documents)).astype(np.float64)

    sums = {state: summed(np.asarray(right, np.float64)) for state, right in answers.items()}
    return ScoreTable(
        metric="recall",
        unit="share of items",
        sums=MappingProxyType(sums),
        weights=summed(np.ones(len(items))),
    )


def recall_of(group: Group, state: str, keep: Kept, *, resamples: int = 2000) -> Recall:
    """Recall of a state on the items kept; NaN where there is none, no interval with a single document."""
    rights = [run.answers[state].right for run in group.runs]
    count = int(keep.sum())
    if not count:
        return Recall(Estimate(float("nan"), _UNDEFINED), 0, ())
    seeds = tuple(float(right[keep].mean()) for right in rights)
    try:
        table = score_table(group.examples, {state: np.mean(rights, axis=0)}, keep)
    except ValueError:  # all in one document
        return Recall(Estimate(float(np.mean(seeds)), _UNDEFINED), count, seeds)
    return Recall(score(bootstrap(table, resamples=resamples), state), count, seeds)


def gain(group: Group, state: str, other: str, keep: Kept, *, resamples: int = 2000) -> Estimate:
    """Recall of one state minus another's on the items kept, paired; NaN where they are too few."""
    rights = {s: np.mean([run.answers[s].right for run in group.runs], axis=0) for s in (state, other)}
    try:
        table = score_table(group.examples, rights, keep)
    except ValueError:
        return Estimate(float("nan"), _UNDEFINED)
    return difference(bootstrap(table, resamples=resamples), state, other)


def marked(examples: Sequence[Example], test: Callable[[Item], bool]) -> Kept:
    """[items], those that pass a test."""
    return np.array([test(item) for _, item in items_of(examples)], bool)


def beyond_all(group: Group) -> Kept:
    """Items beyond the reach of every state that has one: the same for all states, so they compare."""
    limited = [seen for seen in group.sights.values() if seen.reach is not None]
    return marked(group.examples, lambda item: bool(limited) and all(s.beyond(item) for s in limited))


# ---- curves


@dataclass(frozen=True)
class Bin:
    """Items at distances low..high (both included); `middle` is their median distance."""

    low: int
    high: int
    middle: float
    keep: Kept


def bins_of(examples: Sequence[Example], count: int = BINS) -> list[Bin]:
    """Distances cut into bins of about equally many items."""
    distances = np.array([item.distance for _, item in items_of(examples)])
    edges = np.unique(np.quantile(distances, np.linspace(0, 1, count + 1)).round().astype(int))
    found: list[Bin] = []
    for index, low in enumerate(edges[:-1] if len(edges) > 1 else edges):
        is_last = index >= len(edges) - 2
        high = int(edges[-1]) if is_last else int(edges[index + 1]) - 1
        keep = (distances >= low) & (distances <= high)
        if keep.any():
            found.append(Bin(int(low), high, float(np.median(distances[keep])), keep))
    return found


# ---- for machines


def as_data(groups: Sequence[Group], *, resamples: int = 2000) -> dict[str, Any]:
    """Everything measured, as JSON data: items with their distances, answers by run, figures by group."""
    examples = groups[0].examples
    return {
        "items": [
            {
                "task": example.task, "length": example.length, "document": example.cluster,
                "distance": item.distance, "span": item.span, "start": item.start, "stop": item.stop,
                "guess": item.guess,
            }
            for example, item in items_of(examples)
        ],
        "runs": [
            {
                "name": run.name, "seed": run.seed,
                "right": {state: given.right.astype(int).tolist() for state, given in run.answers.items()},
                "peak_cache_bytes": {state: given.peak_bytes for state, given in run.answers.items()},
            }
            for group in groups for run in group.runs
        ],
        "groups": [_group_data(group, resamples) for group in groups],
    }  # fmt: skip


def _group_data(group: Group, resamples: int) -> dict[str, Any]:
    far = beyond_all(group)
    states: dict[str, Any] = {}
    for state in group.states:
        seen = group.sights[state]
        given = [run.answers[state] for run in group.runs]

        def measured(keep: Kept, state: str = state) -> dict[str, Any]:
            return recall_of(group, state, keep, resamples=resamples).as_json()

        states[state] = {
            **asdict(seen),
            "all": measured(np.ones_like(far)),
            "within_reach": measured(marked(group.examples, seen.within)),
            "beyond_reach": measured(marked(group.examples, seen.beyond)),
            "beyond_every_reach": measured(far),
            "right_for_another_text": float(np.mean([answers.by_chance for answers in given])),
            "another_key_of_the_text": float(np.mean([answers.confused for answers in given])),
            "curve": [
                {"low": part.low, "high": part.high, "middle": part.middle, **measured(part.keep)}
                for part in bins_of(group.examples)
            ],
            "tasks": [
                {"task": task, "length": length, **measured(keep)}
                for (task, length), keep in by_task(group.examples).items()
            ],
        }
    data: dict[str, Any] = {"name": group.name, "seeds": [run.seed for run in group.runs], "states": states}
    if "both" in states and CONTROL in states:
        found = gain(group, "both", CONTROL, far, resamples=resamples)
        data["gain_beyond_every_reach"] = {"value": found.value, "ci95": list(found.ci95)}
    return data


def by_task(examples: Sequence[Example]) -> dict[tuple[str, int], Kept]:
    """(task, length) -> the items of it, in order of first appearance."""
    pairs = [(example.task, example.length) for example, _ in items_of(examples)]
    return {pair: np.array([other == pair for other in pairs]) for pair in dict.fromkeys(pairs)}
