"""From a task's plan to a text with needles at known distances, and the questions about it.

Distances are in tokens. The predicting position is the last token of the question, the one whose output is
the answer's first token. An item's *distance* runs from there to the last token of the answer where the text
states it; every later step of the answer has at least as far to look.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from equipoise.evaluate.recall_tasks import TASKS, Ask, Draw, Plan, RecallSettings
from equipoise.evaluate.recall_text import Haystack, Ids, RecallError, insert, opening, word_tokens


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answer that is looked for.

    Attributes:
        answer: its tokens.
        others: answers to other keys in the same text.
        distance: from the predicting position to the last token of the stated answer.
        span: from the last predicting position to the first token of the statement: all that may be needed.
        start, stop: the statement's first token, and one past the last of its answer, from the text's start.
        guess: probability that a blind guess is right.
    """

    answer: Ids
    others: tuple[Ids, ...]
    distance: int
    span: int
    start: int
    stop: int
    guess: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """Tokens after the text, how many to generate, and what to look for in them.

    An item is right if its answer is what was generated; of several, if it is found anywhere in that.
    """

    tokens: Ids
    budget: int
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text and the questions about it, each asked on its own.

    Attributes:
        task, length: name of the task; tokens of text, question and answer together at most.
        cluster: the document the text begins in, to resample by.
        tokens: [T] of the text.
        questions: all of one length.
    """

    task: str
    length: int
    cluster: int
    tokens: NDArray[np.int64]
    questions: tuple[Question, ...]


def build_examples(
    task: str,
    *,
    length: int,
    count: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    words: Ids | None = None,
    keys: Ids | None = None,
    settings: RecallSettings | None = None,
    accept: Callable[[Ids, Ids], bool] | None = None,
) -> list[Example]:
    """Examples of one task and length: half with the asked distance spread evenly, half by its logarithm.

    The same arguments give the same examples, and the first n of more examples are not those of n: distances
    are spread over all of them.

    Args:
        task: a name of `TASKS`.
        length: tokens of text, question and answer together.
        count: examples.
        seed: of everything random.
        tokenizer, haystack: of the model; natural text in its tokens.
        words: what keys and answers are made of; `word_tokens` where None.
        keys: what keys are made of, where they have words of their own.
        settings: how many needles and so on.
        accept: whether a key (first) may have an answer (second); all where None.

    Raises:
        UnknownNameError: no such task.
        RecallError: the length does not hold the task, or there are too few words.
    """
    plan_of, settings = TASKS[task], settings or RecallSettings()
    words = word_tokens(tokenizer, len(haystack.cuts)) if words is None else words
    start, pieces = opening(tokenizer), dict[str, Ids]()
    strata = list(range(-(-count // 2)))
    random.Random(f"{seed} {task} {length}").shuffle(strata)
    examples: list[Example] = []
    for index in range(count):
        rng = random.Random(f"{seed} {task} {length} {index}")
        draw = Draw(tokenizer, words, settings, rng, keys, accept, pieces)
        plan = plan_of(draw)
        share = (strata[index // 2] + rng.random()) / len(strata)
        cluster = (seed + index) % len(haystack.documents)
        examples.append(_example(plan, task, length, cluster, haystack, rng, (share, index % 2 == 0), start))
    return examples


def _example(
    plan: Plan,
    task: str,
    length: int,
    cluster: int,
    haystack: Haystack,
    rng: random.Random,
    stratum: tuple[float, bool],
    start: Ids,
) -> Example:
    question, budget = max(len(a.tokens) for a in plan.asks), max(a.budget for a in plan.asks)
    room = length - sum(len(n.tokens) for n in plan.needles) - question - budget - len(start)
    if room < 1:
        raise RecallError(
            f"expected a length of at least {length - room + 1} tokens for {task} with this tokenizer, got "
            f"{length}; raise --lengths or lower --needles"
        )
    text = haystack.stretch(cluster, room, rng)
    tails = [len(needle.tokens) - needle.stop for needle in plan.needles]
    nearest, farthest = question + max(tails) + 1, length - budget - len(start)
    targets = _targets(plan, rng, stratum, (nearest, farthest))
    inserts: list[tuple[int, Ids]] = []
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    later, last = question, room
    for index in order:  # from the nearest backwards, as each shifts those before it
        wanted = room + later + tails[index] - int(targets[index])
        last = min(last, haystack.snap(text, min(last, max(0, wanted))))
        inserts.append((last, plan.needles[index].tokens))
        later += len(plan.needles[index].tokens)
    tokens, starts = insert(text, inserts[::-1])
    tokens = np.concatenate([np.array(start, dtype=np.int64), tokens])
    place = {index: len(start) + at for index, at in zip(order[::-1], starts, strict=True)}
    questions = [_question(plan, ask, len(tokens), place) for ask in plan.asks]
    return Example(task=task, length=length, cluster=cluster, tokens=tokens, questions=tuple(questions))


def _question(plan: Plan, ask: Ask, text: int, place: dict[int, int]) -> Question:
    predicting = text + len(ask.tokens) - 1
    items: list[Item] = []
    for answer, index in zip(ask.answers, ask.needles, strict=True):
        start = place[index]
        stop = start + plan.needles[index].stop
        items.append(
            Item(
                answer=answer, others=tuple(a for a in plan.answers if a not in ask.answers),
                distance=predicting - (stop - 1), span=predicting + ask.budget - 1 - start, start=start,
                stop=stop, guess=len(ask.answers) / plan.space,
            )
        )  # fmt: skip
    return Question(tokens=ask.tokens, budget=ask.budget, items=tuple(items))


def spread(share: float, evenly: bool, bounds: tuple[int, int]) -> int:
    """A distance at a share of the way between two bounds, or of the way between their logarithms."""
    low, high = bounds[0], max(bounds[0] + 1, bounds[1])
    if evenly:
        return round(low + share * (high - low))
    return round(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))


def _targets(
    plan: Plan, rng: random.Random, stratum: tuple[float, bool], bounds: tuple[int, int]
) -> list[float]:
    """A distance to aim at for every needle, all different, the lead's by its stratum."""
    lead, count = spread(*stratum, bounds), len(plan.needles)

    def drawn(limits: tuple[int, int]) -> float:
        return spread(rng.random(), rng.random() < 0.5, limits) + rng.random() / 2

    if not plan.chained:
        return [float(lead) if i == plan.lead else drawn(bounds) for i in range(count)]
    before = sorted((drawn((lead + 1, bounds[1])) for _ in range(plan.lead)), reverse=True)
    after = sorted((drawn((bounds[0] - 1, max(bounds[0], lead) - 1)) for _ in range(count - plan.lead - 1)),
                   reverse=True)  # fmt: skip
    return [*before, float(lead), *after]
