"""From lm-eval's samples to scores of single documents: what counts as one, and what guessing would get."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from equipoise.evaluate.failures import HarnessError
from equipoise.evaluate.scores import MetricScores, TaskScores
from equipoise.statistics import Floats

GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""lm-eval's metrics of which option the model prefers."""
Samples = Sequence[Mapping[str, Any]]


def task_scores(
    task: Any, samples: Samples, reported: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]
) -> TaskScores:
    """One task's scores.

    Args:
        task: lm-eval's.
        samples: its documents with what the model answered, once for each filter.
        reported: lm-eval's own aggregates by `metric,filter`.
        higher_is_better: by metric; metrics of which less is better are left out.

    Raises:
        HarnessError: no metric is an average over documents of which more is better.
    """
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    first = next(iter(by_filter.values()))
    hashes = tuple(_short_hash(sample["doc_hash"] + sample["prompt_hash"]) for sample in first)
    values = {name: float(value) for name, value in reported.items() if _is_metric(name, value)}
    metrics: dict[str, MetricScores] = {}
    for name, value in values.items():
        metric, _, chosen = name.partition(",")
        known = by_document([sample.get(metric) for sample in by_filter[chosen]], value)
        if known is not None and higher_is_better.get(metric) is not False:
            sums, weights = known
            metrics[name] = MetricScores(
                sums=sums, weights=weights, chance=chance_of(task, metric, first) * weights
            )
    if not metrics:
        raise HarnessError(
            f"task {task.task_name}: none of its scores ({', '.join(values) or 'no number'}) is an average "
            "over documents of which more is better, so states cannot be compared document by document. "
            "`equipoise lm-eval` runs the task as it is."
        )
    return TaskScores(documents=hashes, metrics=metrics, reported=values)


def by_document(values: Sequence[Any], reported: float) -> tuple[Floats, Floats] | None:
    """(sums, weights) of each document, [documents] each, such that their ratio is what lm-eval reports.

    Documents count with one score each; with several (IFEval's instructions); or, marked -1, not at all
    (RULER's lengths). None where no such reading gives the reported value.
    """
    lists = [value if isinstance(value, list) else [] if value is None else [value] for value in values]
    if not all(
        isinstance(part, bool | int | float | np.number | np.bool_) for parts in lists for part in parts
    ):
        return None
    for dropped in (None, -1):
        kept = [[float(part) for part in parts if dropped is None or part != dropped] for parts in lists]
        sums = np.array([sum(parts) for parts in kept], dtype=np.float64)
        weights = np.array([len(parts) for parts in kept], dtype=np.float64)
        if weights.sum() > 0 and math.isclose(sums.sum() / weights.sum(), reported, abs_tol=1e-9):
            return sums, weights
    return None


def chance_of(task: Any, metric: str, samples: Samples) -> Floats:
    """The score to expect of each document by guessing, [documents].

    One over the number of options (the right ones over all where several are right) for metrics of which
    option the model prefers; 0 for what has to be generated. A task that scores options by a function of its
    own is asked what it gives to each option in turn, and the mean taken.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return np.zeros(len(samples))
    if callable(getattr(task.config, "process_results", None)):
        return np.array([_mean_over_options(task, metric, sample) for sample in samples], dtype=np.float64)
    if metric not in GUESSED:
        return np.zeros(len(samples))
    return np.array([_share_of_right_options(task, sample) for sample in samples], dtype=np.float64)


def _share_of_right_options(task: Any, sample: Mapping[str, Any]) -> float:
    target = sample["target"]
    right = len(set(target)) if task.multiple_target and isinstance(target, list | tuple) else 1
    return right / _options(task, sample)


def _options(task: Any, sample: Mapping[str, Any]) -> int:
    requests = len(sample["arguments"])
    # for mutual information each option is scored once more, without its question
    return requests // 2 if "acc_mutual_info" in task._metric_fn_list else requests


def _mean_over_options(task: Any, metric: str, sample: Mapping[str, Any]) -> float:
    options = len(sample["arguments"])
    scores: list[float] = []
    for preferred in range(options):
        answers = [(0.0 if option == preferred else -1.0, option == preferred) for option in range(options)]
        given = task.process_results(sample["doc"], answers).get(metric)
        if not isinstance(given, bool | int | float | np.number | np.bool_):
            return 0.0
        scores.append(float(given))
    return sum(scores) / options


def _is_metric(name: str, value: Any) -> bool:
    return "," in name and "_stderr," not in name and isinstance(value, int | float)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
