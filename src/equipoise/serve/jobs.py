"""A request on its way through the scheduler, and what comes back of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from equipoise.layers.cache import HybridCache
from equipoise.models.reading import PromptState
from equipoise.serve.errors import ApiError
from equipoise.serve.sampling import Sampling, TokenLogprob
from equipoise.serve.text import TextStream

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A part of one choice's text.

    Attributes:
        index: of the choice.
        text: may be empty.
        tokens: how many new tokens stand behind it.
        logprobs: of these tokens, where asked for.
        reason: why the choice ended; None while it goes on.
    """

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    reason: Reason | None = None


Event = Piece | ApiError
"""What a request receives: pieces until every choice has ended, or one error."""


@dataclass(eq=False)
class Job:
    """One accepted request.

    Attributes:
        prompts: token ids of each prompt, after the state's if there is one.
        copies: choices a prompt (OpenAI's n).
        sampling, stops, max_tokens: of every choice.
        ends: token ids that end a text.
        state: a saved prompt to go on from.
        deliver: hands an event on; called from the scheduler's thread and must not block.
        deadline: on the clock of `time.monotonic`.
        cancelled: nobody waits for it any more; set from any thread, seen at the next step.
        left: choices that have not ended.
    """

    prompts: Sequence[Sequence[int]]
    copies: int
    sampling: Sampling
    stops: Sequence[str]
    max_tokens: int
    ends: frozenset[int]
    deliver: Callable[[Event], None]
    deadline: float
    state: PromptState | None = None
    cancelled: bool = False
    started: float = field(default_factory=time.monotonic)
    left: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.left = self.size

    @property
    def size(self) -> int:
        """Sequences it needs at once."""
        return len(self.prompts) * self.copies

    def fail(self, error: ApiError) -> None:
        """Answer with an error, unless it was answered whole."""
        if not self.ended:
            self.ended = True
            self.deliver(error)


@dataclass(eq=False)
class Reading:
    """A prompt being read; becomes `copies` sequences.

    Attributes:
        job: whose it is.
        number: of the prompt in the job.
        tokens: what is to be read [1, T].
        done: tokens of it that were read.
        cache: None until the first chunk.
    """

    job: Job
    number: int
    tokens: torch.Tensor
    done: int = 0
    cache: HybridCache | None = None


@dataclass(eq=False)
class Row:
    """One row of the batch that decodes.

    Attributes:
        job: whose it is.
        index: of the choice.
        length: tokens that its state has read.
        last: the token that is read next.
        text: what its tokens say.
        generator: of its draws; None where it takes the likeliest token.
        count: new tokens so far.
        held: tokens, and their log-probabilities, whose text was not sent yet.
    """

    job: Job
    index: int
    length: int
    text: TextStream
    generator: torch.Generator | None
    last: int = -1
    count: int = 0
    held: int = 0
    held_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    ended: bool = False

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """Note the chosen token, and send what can be sent of the text."""
        job = self.job
        self.last, self.count, self.held = token, self.count + 1, self.held + 1
        if logprob is not None:
            self.held_logprobs.append(logprob)
        end = token in job.ends
        text = "" if end else self.text.push(token)
        reason: Reason | None = "stop" if end or self.text.stopped else None
        if reason is None and self.count >= job.max_tokens:
            reason = "length"
        if reason is not None:
            text += self.text.finish()
            reason = "stop" if self.text.stopped else reason
        if text or reason is not None or self.held_logprobs:
            job.deliver(Piece(self.index, text, self.held, tuple(self.held_logprobs), reason))
            self.held, self.held_logprobs = 0, []
        if reason is not None:
            self.ended = True
            job.left -= 1
            job.ended = job.left == 0
