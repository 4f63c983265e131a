"""Running recall examples through a model: streamed prefill, greedy answers, every branch state.

Shapes: B examples at a time, T tokens of their texts (padded on the left to the longest), C tokens a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from equipoise.evaluate.recall_examples import Example, Item, Question
from equipoise.evaluate.recall_text import Ids, RecallError
from equipoise.layers.cache import HybridCache
from equipoise.layers.mixer import SINKS_STATE_KEYS, AttentionMode
from equipoise.models.adapters import adapters_disabled
from equipoise.models.branches import BRANCH_STATES, branches, converted_mixers
from equipoise.models.layout import equal_window, reach
from equipoise.registry import unknown_name

CONTROL = "swa_sinks_equal_bytes"
"""Training-free window and sinks, the window enlarged until its state takes the hybrid's bytes."""
CONTROL_SINKS = 4
RENORMALISED = "_renormalised"
STATES = (*BRANCH_STATES, "window_renormalised", "linear_renormalised", CONTROL)
"""The audit's names: a branch without a suffix is read literally."""
DEFAULT_STATES = (
    "softmax", "both", "window", "window_renormalised", "linear", "linear_renormalised", "none", CONTROL
)  # fmt: skip
CHUNK = 1024
"""Tokens of a text that go through the model at a time."""

Tick = Callable[[], None]


@dataclass(frozen=True)
class Sight:
    """How far a branch state can see without linear attention.

    Attributes:
        reach: tokens that stacked windows relay; None without limit.
        sinks: the first so many tokens are seen from everywhere.
        window: of the control; None for the model's own states.
    """

    reach: int | None
    sinks: int = 0
    window: int | None = None

    def beyond(self, item: Item) -> bool:
        """Whether no token of the stated answer can have been relayed: the last one is out of reach already.

        A statement that begins in the sinks is not beyond.
        """
        return self.reach is not None and item.distance > self.reach and item.start >= self.sinks

    def within(self, item: Item) -> bool:
        """Whether the whole statement can be relayed, to the last step of the answer too."""
        return self.reach is None or item.span <= self.reach or item.stop <= self.sinks


@dataclass
class Answers:
    """What a model answered in one branch state; arrays are [items], in the order of `items_of`.

    Attributes:
        right: 1 where the answer is the item's.
        by_chance: 1 where it would be right for an item of another text.
        confused: 1 where it is the answer to another key of the same text.
        peak_bytes: most that the cache held, all rows of the largest batch together.
        generated: the tokens, by question.
    """

    right: NDArray[np.float64]
    by_chance: NDArray[np.float64]
    confused: NDArray[np.float64]
    peak_bytes: int
    generated: list[Ids] = field(default_factory=list[Ids])


def questions_of(examples: Iterable[Example]) -> list[tuple[Example, Question]]:
    """All questions in order, with their texts."""
    return [(example, question) for example in examples for question in example.questions]


def items_of(examples: Iterable[Example]) -> list[tuple[Example, Item]]:
    """All items in order, with their texts."""
    return [(example, item) for example, question in questions_of(examples) for item in question.items]


# ---- branch states


def check_states(names: Sequence[str]) -> None:
    """Raise unless all are states.

    Raises:
        UnknownNameError: one is not.
        RecallError: none at all, or one twice.
    """
    for name in names:
        if name not in STATES:
            raise unknown_name("branch state", name, STATES)
    if not names or len(set(names)) < len(names):
        raise RecallError(f"expected different branch states, got {', '.join(names) or 'none'}")


@contextmanager
def in_state(model: PreTrainedModel, name: str) -> Generator[None]:
    """The model in a state of `STATES`, for the time of the block."""
    if name == CONTROL:
        control = AttentionMode("swa", window=sight(model, name).window, sinks=CONTROL_SINKS)
        with adapters_disabled(model), branches(model, control):
            yield
        return
    state, reading = name.removesuffix(RENORMALISED), "literal"
    with branches(model, state, reading="renormalised" if name.endswith(RENORMALISED) else reading):
        yield


def sight(model: PreTrainedModel, name: str) -> Sight:
    """How far a state sees; the hybrid's branches share the hybrid's reach, so that they share its items."""
    config = converted_mixers(model)[0].config
    if name in ("softmax", "softmax_lora"):
        return Sight(None)
    if name == CONTROL:
        window = equal_window(model, sinks=CONTROL_SINKS)
        return Sight(reach(model, window=window), CONTROL_SINKS, window)
    if name == "sinks":  # layers with a window of their own relay all the same
        return Sight(reach(model, window=1), SINKS_STATE_KEYS)
    return Sight(reach(model), config.sinks if config.window is not None else 0)


# ---- reading and answering


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None,
    *,
    chunk: int = CHUNK,
) -> tuple[HybridCache, int]:
    """Read texts chunk by chunk in the branch state the model is in.

    A hybrid's cache stays the same size however long the text, and no logits are kept, so memory does not
    grow with T (but for the ids themselves, and in `softmax`, whose keys and values are the whole text).

    Args:
        model: converted.
        tokens: padded on the left.
        mask: False at padding; None without any.
        chunk: C.

    Returns:
        The cache, and the most bytes it held.
    """
    cache: HybridCache = model.make_cache()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    peak = 0
    for start in range(0, tokens.shape[1], chunk):
        _step(
            model, tokens[:, start : start + chunk], None if mask is None else mask[:, : start + chunk], cache
        )
        peak = max(peak, cache.state_bytes())
    return cache, peak


def _step(model: Any, tokens: Tensor, mask: Tensor | None, cache: HybridCache) -> Tensor:
    """Logits [B, V] after the last of these tokens; `mask` covers all tokens so far."""
    read, count = cache.get_seq_length(), tokens.shape[1]
    if mask is None:
        positions = torch.arange(read, read + count, device=tokens.device)[None].expand(len(tokens), -1)
    else:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -count:]
    out = model(
        input_ids=tokens, attention_mask=None if mask is None else mask.long(), position_ids=positions,
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    return out.logits[:, -1]


def fork(cache: HybridCache) -> HybridCache:
    """A cache that goes on from the same text and leaves this one alone: layers replace tensors."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    cache: HybridCache,
    mask: Bool[Tensor, "B T"] | None,
    questions: Int[Tensor, "B Q"],
    budget: int,
) -> Int[Tensor, "B N"]:
    """Greedy answers of `budget` tokens to one question a text; the cache can be asked again.

    Args:
        model: in the state that the cache was made in.
        cache, mask: of the texts, from `prefill`.
        questions: token ids, without padding.
        budget: N.
    """
    cache = fork(cache)
    step, given = questions, []
    for _ in range(budget):
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, step.shape[1]), value=True)
        step = _step(model, step, mask, cache).argmax(-1, keepdim=True)
        given.append(step)
    return torch.cat(given, 1)


def run_state(
    model: PreTrainedModel,
    examples: Sequence[Example],
    state: str,
    *,
    batch_size: int = 8,
    chunk: int = CHUNK,
    tick: Tick = lambda: None,
) -> Answers:
    """Ask everything in one branch state.

    Args:
        model: converted; its adapters not merged where the state is `softmax`.
        examples: of any tasks and lengths.
        state: a name of `STATES`.
        batch_size: texts at a time.
        chunk: tokens of them at a time.
        tick: called after each batch.
    """
    generated: dict[tuple[int, int], Ids] = {}
    peak = 0
    with in_state(model, state):
        for batch in batches(examples, batch_size):
            tokens, mask = padded([examples[index].tokens for index in batch])
            tokens, mask = tokens.to(model.device), None if mask is None else mask.to(model.device)
            cache, held = prefill(model, tokens, mask, chunk=chunk)
            peak = max(peak, held)
            for number, first in enumerate(examples[batch[0]].questions):
                asked = [examples[index].questions[number].tokens for index in batch]
                given = answer(model, cache, mask, torch.tensor(asked, device=model.device), first.budget)
                for index, row in zip(batch, given.tolist(), strict=True):
                    generated[index, number] = tuple(row)
            tick()
    ordered = [generated[i, n] for i, example in enumerate(examples) for n in range(len(example.questions))]
    return grade(examples, ordered, peak)


def batches(examples: Sequence[Example], size: int) -> list[list[int]]:
    """Indices of examples that can be asked together, longest first: equal tasks, lengths and questions."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, example in enumerate(examples):
        shape = tuple((len(question.tokens), question.budget) for question in example.questions)
        groups.setdefault((-example.length, example.task, shape), []).append(index)
    ordered = [groups[key] for key in sorted(groups)]
    return [group[low : low + size] for group in ordered for low in range(0, len(group), size)]


def padded(texts: Sequence[NDArray[np.int64]]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"] | None]:
    """Texts padded on the left, and the mask of real tokens; None where nothing is padded."""
    longest = max(map(len, texts))
    tokens = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, longest - len(text) :] = torch.from_numpy(text)
        mask[row, longest - len(text) :] = True
    return tokens, None if bool(mask.all()) else mask


# ---- grading


def is_right(given: Ids, wanted: Ids, *, anywhere: bool) -> bool:
    """Whether an answer is what was generated, or (`anywhere`) stands somewhere in it."""
    if not anywhere:
        return given == wanted
    return any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1))


def grade(examples: Sequence[Example], generated: Sequence[Ids], peak_bytes: int = 0) -> Answers:
    """Compare answers with what was asked, with another text's items, and with other keys of the same text.

    The other text is the next one of the same task and length: what a model scores there it scores without
    having read the right one.
    """
    asked = questions_of(examples)
    right: list[float] = []
    chance: list[float] = []
    confused: list[float] = []
    following = _next_alike(examples)
    for (example, question), given in zip(asked, generated, strict=True):
        several = len(question.items) > 1
        number = next(n for n, other in enumerate(example.questions) if other is question)
        stranger = following[id(example)].questions[number]
        for item, other in zip(question.items, stranger.items, strict=True):
            right.append(is_right(given, item.answer, anywhere=several))
            chance.append(is_right(given, other.answer, anywhere=several))
            confused.append(any(is_right(given, wrong, anywhere=several) for wrong in item.others))
    return Answers(np.array(right, float), np.array(chance, float), np.array(confused, float), peak_bytes,
                   list(generated))  # fmt: skip


def _next_alike(examples: Sequence[Example]) -> Mapping[int, Example]:
    groups: dict[tuple[str, int], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.task, example.length), []).append(example)
    return {
        id(example): group[(place + 1) % len(group)]
        for group in groups.values()
        for place, example in enumerate(group)
    }
