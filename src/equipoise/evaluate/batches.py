"""lm-eval's batches, made before they are run, so that ranks can share them out.

A likelihood depends a little on what stands beside it in its batch, by rounding. Several ranks therefore run
the very batches that lm-eval 0.4.13 makes in one process (`lm_eval.models.utils.Collator`), and give the same
scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from equipoise.distributed import spread

T = TypeVar("T")


def token_batches(requests: Sequence[Any], size: int, *, reuse: bool) -> list[list[int]]:
    """Indices of the requests in each batch of log-likelihoods.

    Args:
        requests: (words, context tokens, continuation tokens) of each.
        size: rows of a batch.
        reuse: whether requests that differ in their last token only share a row.
    """
    groups: dict[Any, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        groups.setdefault(tuple(context + continuation[:-1]) if reuse else index, []).append(index)
    rows = {max(group, key=lambda i: len(requests[i][2])): group for group in groups.values()}

    def place(index: int) -> Any:
        tokens = requests[index][1] + requests[index][2]
        return -len(tokens), tuple(tokens)

    return [sorted(i for row in part for i in rows[row]) for part in _parts(sorted(rows, key=place), size)]


def prompt_batches(
    prompts: Sequence[tuple[str, dict[str, Any]]], size: int, encode: Callable[[str], list[int]]
) -> list[list[int]]:
    """Indices of the requests in each batch of generated answers; (text, settings) of each."""
    groups: dict[str, list[int]] = {}
    for index, (_, settings) in enumerate(prompts):
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(index)
    lengths = [len(encode(text)) for text, _ in prompts]
    ordered = [sorted(group, key=lambda i: (-lengths[i], prompts[i][0])) for group in groups.values()]
    return [part for group in ordered for part in _parts(group, size)]


def _parts(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def in_batches(
    requests: Sequence[Any], run: Callable[[list[Any]], list[T]], batches: Sequence[Sequence[int]]
) -> list[T]:
    """Answers to all requests in their order; ranks share out the batches."""
    answers: dict[int, T] = {}
    done = spread(batches, lambda batch: run([requests[i] for i in batch]))
    for batch, given in zip(batches, done, strict=True):
        answers |= dict(zip(batch, given, strict=True))
    return [answers[i] for i in range(len(requests))]
