"""Recall tasks: what is hidden, and what is asked.

A new task is one function here, or in a file of its own that is imported, under `TASKS.register`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from transformers import PreTrainedTokenizerBase

from equipoise.evaluate.recall_text import LEAST_WORDS, Ids, RecallError, encode
from equipoise.registry import Registry

Wording = Literal["sentences", "pairs"]

VALUES = 4
"""Values of one key in `multivalue`."""
HOPS = 3
"""Statements of a chain in `tracking`: the value, and two links."""
_TRIES = 1000
JOINTS = 2
"""Tokens between two answers of a list that are not counted against it: a comma, an `and`."""


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """What to ask.

    Attributes:
        needles: statements in each text, where the task has more than one.
        answer_words: words of one answer.
        key_words: words of one key.
        options: offer so many answers in the question, in every rotation of their order; 0 for none.
        wording: `sentences`, or bare `pairs` for models that know nothing else.

    Raises:
        RecallError: a setting out of range.
    """

    needles: int = 8
    answer_words: int = 3
    key_words: int = 1
    options: int = 0
    wording: Wording = "sentences"

    def __post_init__(self) -> None:
        words = min(self.answer_words, self.key_words)
        if self.needles < 2 or words < 1 or self.options == 1 or self.options < 0:
            raise RecallError(
                "expected at least 2 needles, 1 word for keys and answers, and 0 or at least 2 options, got "
                f"{self.needles}, {words} and {self.options}"
            )
        if self.options and self.wording == "pairs":
            raise RecallError("options need a question in words: leave them out, or use sentences")


# ---- statements and questions


@dataclass(frozen=True)
class Needle:
    """A statement; its answer, if any, ends before index `stop`."""

    tokens: Ids
    stop: int


@dataclass(frozen=True)
class Ask:
    """A question before the text exists: answers, and the needle that states each."""

    tokens: Ids
    answers: tuple[Ids, ...]
    needles: tuple[int, ...]
    budget: int


@dataclass(frozen=True)
class Plan:
    """Needles and questions of one example.

    Attributes:
        needles, asks: as they are.
        lead: the needle whose distance is spread evenly over examples.
        chained: whether needles must keep their order.
        answers: every answer stated.
        space: how many answers there are to guess from (with options: those offered).
    """

    needles: Sequence[Needle]
    asks: Sequence[Ask]
    lead: int
    answers: tuple[Ids, ...]
    space: float
    chained: bool = False


@dataclass
class Draw:
    """Random words and the phrases to put them in, for one example.

    Attributes:
        tokenizer, words, settings, rng: what to draw from, and how.
        keys: words that keys are made of; those of `words` that are left for them where None.
        accept: whether a key (first) may have an answer (second), to keep some pairs for another purpose; all
            where None. An answer without a key of its own comes with an empty one.
        pieces: phrases in tokens, filled as they come up.
    """

    tokenizer: PreTrainedTokenizerBase
    words: Ids
    settings: RecallSettings
    rng: random.Random
    keys: Ids | None = None
    accept: Callable[[Ids, Ids], bool] | None = None
    pieces: dict[str, Ids] = field(default_factory=dict[str, Ids])

    def keys_and_answers(self, keys: int, answers: int) -> tuple[list[Ids], list[Ids], float]:
        """Keys without a common word, different answers of other words, and how many answers there are.

        Raises:
            RecallError: too few words.
        """
        size, needed = self.settings.answer_words, keys * self.settings.key_words
        own, rest = list(self.words if self.keys is None else self.keys), list(self.words)
        if len(own) < needed or len(rest) < (needed if self.keys is None else 0) + LEAST_WORDS // 2:
            raise RecallError(
                f"expected at least {needed} words for {keys} keys and {LEAST_WORDS // 2} more for answers, "
                f"got {len(set(own) | set(rest))}: ask for fewer needles"
            )
        drawn_keys: list[Ids] = []
        for _ in range(keys):
            key = tuple(self.rng.sample(own, self.settings.key_words))
            drawn_keys.append(key)
            own, rest = ([word for word in words if word not in key] for words in (own, rest))
        drawn: dict[Ids, None] = {}
        for index in range(answers):
            key = drawn_keys[index] if index < keys else ()
            drawn[self._answer(key, partial(self.rng.choices, rest, k=size), drawn)] = None
        return drawn_keys, list(drawn), float(self.settings.options or len(rest) ** size)

    def _answer(self, key: Ids, draw: Callable[[], list[int]], taken: Collection[Ids]) -> Ids:
        for _ in range(_TRIES):
            found = tuple(draw())
            if found not in taken and (self.accept is None or self.accept(key, found)):
                return found
        raise RecallError(f"expected an answer that is new and accepted, got none in {_TRIES} draws")

    def fill(self, template: str, **slots: Ids) -> tuple[Ids, int]:
        """A template's tokens, and the index one past its `value` (past all of them, without one)."""
        ids: list[int] = []
        stop = None
        for part in re.split(r"(\{\w+\})", template):
            if part.startswith("{"):
                ids += slots[part[1:-1]]
                stop = len(ids) if part == "{value}" else stop
            elif part:
                if part not in self.pieces:
                    self.pieces[part] = encode(self.tokenizer, part)
                ids += self.pieces[part]
        return tuple(ids), len(ids) if stop is None else stop

    def needle(self, template: str, **slots: Ids) -> Needle:
        """A statement."""
        return Needle(*self.fill(template, **slots))

    def asks(self, template: str, answer: Ids, needle: int, others: Sequence[Ids], **slots: Ids) -> list[Ask]:
        """The question; with options, one for every rotation of their order."""
        count, size = self.settings.options, len(answer)
        question = self.fill(template, **slots)[0]
        if not count:
            return [Ask(question, (answer,), (needle,), size)]
        offered = [answer, *[other for other in others if other != answer][: count - 1]]
        while len(offered) < count:
            made = tuple(self.rng.choices(self.words, k=size))
            offered += [made] if made not in offered else []
        self.rng.shuffle(offered)
        asks: list[Ask] = []
        for turn in range(count):
            turned = offered[turn:] + offered[:turn]
            listed = [token for option in turned for token in self.fill(",{value}", value=option)[0]]
            intro = (*self.fill("\nOne of these answers the next line")[0], *listed, *self.fill(".")[0])
            asks.append(Ask((*intro, *question), (answer,), (needle,), size))
        return asks


TASKS: Registry[Callable[[Draw], Plan]] = Registry("recall task")

PAIR, PAIR_ASKED = "\n@{key}{value}", "\n@{key}"
"""A bare pair: its key, then its answer."""


def _lookup(draw: Draw, needles: int, *, ask_all: bool) -> Plan:
    """Several keys with an answer each; one of them asked, or all."""
    bare = draw.settings.wording == "pairs"
    stated = PAIR if bare else "\nThe code of{key} is{value}."
    asked = PAIR_ASKED if bare else "\nThe code of{key} is"
    keys, answers, space = draw.keys_and_answers(needles, needles)
    statements = [draw.needle(stated, key=k, value=a) for k, a in zip(keys, answers, strict=True)]
    asks = [
        ask
        for index in range(needles if ask_all else 1)
        for ask in draw.asks(asked, answers[index], index, answers, key=keys[index])
    ]
    return Plan(statements, asks, 0, tuple(answers), space)


@TASKS.register("passkey")
def passkey(draw: Draw) -> Plan:
    """… text … The pass key is red ship nine. Remember it. … text … The pass key is -> red ship nine"""
    if draw.settings.wording == "pairs":
        return _lookup(draw, 1, ask_all=False)
    _, answers, space = draw.keys_and_answers(0, 1)
    statement = draw.needle("\nThe pass key is{value}. Remember it.", value=answers[0])
    return Plan([statement], draw.asks("\nThe pass key is", answers[0], 0, ()), 0, tuple(answers), space)


@TASKS.register("mqar")
def associative_recall(draw: Draw) -> Plan:
    """Multi-query associative recall: as multikey, and every key is asked, each on its own."""
    return _lookup(draw, draw.settings.needles, ask_all=True)


@TASKS.register("multikey")
def multikey(draw: Draw) -> Plan:
    """… The code of dog is red ship nine. … The code of cow is … … The code of dog is -> red ship nine"""
    return _lookup(draw, draw.settings.needles, ask_all=False)


@TASKS.register("multivalue")
def multivalue(draw: Draw) -> Plan:
    """… One code of dog is red. … One code of dog is new. … The codes of dog are -> red, new, in any order"""
    _in_words_only(draw, "multivalue")
    if draw.settings.options:
        raise RecallError("multivalue asks for several answers at once: leave out options, or multivalue")
    wanted = min(VALUES, draw.settings.needles)
    others = draw.settings.needles - wanted
    keys, answers, space = draw.keys_and_answers(1 + others, wanted + others)
    owners = [keys[0]] * wanted + keys[1:]
    stated = "\nOne code of{key} is{value}."
    needles = [draw.needle(stated, key=k, value=a) for k, a in zip(owners, answers, strict=True)]
    question = draw.fill("\nAll codes of{key} are", key=keys[0])[0]
    budget = wanted * (draw.settings.answer_words + JOINTS)
    ask = Ask(question, tuple(answers[:wanted]), tuple(range(wanted)), budget)
    return Plan(needles, [ask], 0, tuple(answers), space)


@TASKS.register("tracking")
def tracking(draw: Draw) -> Plan:
    """… Variable dog equals red. … Variable cow equals variable dog. … the value of variable cow is -> red"""
    _in_words_only(draw, "tracking")
    chains = max(2, draw.settings.needles // HOPS)
    keys, answers, space = draw.keys_and_answers(chains * HOPS, chains)
    owner = [index for index in range(chains) for _ in range(HOPS)]
    draw.rng.shuffle(owner)  # the chains' statements in turn, each chain in its own order
    needles: list[Needle] = []
    lead, said = 0, [0] * chains
    for position, chain in enumerate(owner):
        key, before = keys[chain * HOPS + said[chain]], keys[chain * HOPS + said[chain] - 1]
        if said[chain]:
            needles.append(draw.needle("\nVariable{key} equals variable{other}.", key=key, other=before))
        else:
            needles.append(draw.needle("\nVariable{key} equals{value}.", key=key, value=answers[chain]))
            lead = position if chain == 0 else lead
        said[chain] += 1
    asked = "\nIn the end, the value of variable{key} is"
    asks = draw.asks(asked, answers[0], lead, answers, key=keys[HOPS - 1])
    return Plan(needles, asks, lead, tuple(answers), space, chained=True)


def _in_words_only(draw: Draw, task: str) -> None:
    if draw.settings.wording == "pairs":
        raise RecallError(f"{task} cannot be said in bare pairs: use sentences, or leave it out")
