"""Continuous batching: one thread that admits, reads prompts chunk by chunk, and decodes all rows together.

Every turn admits what fits, reads up to one chunk of prompts, and takes one step of decoding; rows join and
leave between steps. The states of all rows are one cache, whose size is known beforehand (`capacity_of`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from equipoise.layers.cache import HybridCache
from equipoise.layers.cache_rows import append_rows, copy_rows, padding_mask, select_rows
from equipoise.serve.capacity import Capacity
from equipoise.serve.errors import ApiError, failed, queue_full, shutting_down, timed_out
from equipoise.serve.jobs import Job, Reading, Row
from equipoise.serve.sampling import TokenLogprob, choose, logprob_of
from equipoise.serve.settings import ServeSettings
from equipoise.serve.text import TextStream

_logger = logging.getLogger("equipoise.serve")


@dataclass(frozen=True)
class Status:
    """What the scheduler is doing.

    Attributes:
        running: sequences that have a place.
        waiting: requests that have none yet.
        capacity: how many places there are.
        accepting: whether new requests are taken.
        generated: tokens since the start.
    """

    running: int
    waiting: int
    capacity: int
    accepting: bool
    generated: int


class Scheduler:
    """Serves jobs on a model, in the branch state it is in.

    Args:
        model: a converted model; nobody else may use it meanwhile.
        tokenizer: the model's.
        settings: limits.
        capacity: how many sequences fit.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: ServeSettings, capacity: Capacity) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings, self.capacity = settings, capacity
        self.waiting: deque[Job] = deque()
        self.reading: deque[Reading] = deque()
        self.joining: list[tuple[Row, HybridCache]] = []
        self.rows: list[Row] = []
        self.cache: HybridCache | None = None
        self.changed = threading.Condition()
        self.accepting, self.stop_at = True, math.inf
        self.seconds_a_job, self.generated = 1.0, 0
        self.thread = threading.Thread(target=self._run, name="equipoise-scheduler", daemon=True)

    # ---- called from other threads

    def start(self) -> None:
        """Begin to work."""
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Accept a job: it will be answered, in full or with an error.

        Raises:
            ApiError: 503 once shutdown has begun, 429 when the queue is full.
        """
        with self.changed:
            if not self.accepting or not self.thread.is_alive():
                raise shutting_down()
            waiting = self._waiting(job)
            if waiting > self.settings.queue_size:
                raise queue_full(waiting - 1, self._retry_after())
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop working on a job; nothing more is delivered."""
        with self.changed:
            job.cancelled = True
            self.changed.notify()

    def drain(self, seconds: float) -> None:
        """Take no new jobs; those accepted have so long to finish, then they fail, and the thread ends."""
        with self.changed:
            self.accepting = False
            self.stop_at = min(self.stop_at, time.monotonic() + seconds)
            self.changed.notify()

    def status(self) -> Status:
        """A look from outside."""
        with self.changed:
            return Status(
                running=self._running(), waiting=len(self.waiting), capacity=self.capacity.sequences,
                accepting=self.accepting and self.thread.is_alive(), generated=self.generated,
            )  # fmt: skip

    def _running(self) -> int:
        reading = sum(one.job.copies for one in self.reading)
        return reading + len(self.joining) + len(self.rows)

    def _jobs(self) -> set[Job]:
        """Those that have a place."""
        rows = (*(row for row, _ in self.joining), *self.rows)
        return {*(one.job for one in self.reading), *(row.job for row in rows)}

    def _waiting(self, *more: Job) -> int:
        """Jobs that have to wait; those that only have not been seen yet do not."""
        free = self.capacity.sequences - self._running()
        jobs = (*self.waiting, *more)
        for number, job in enumerate(jobs):
            free -= job.size
            if free < 0:
                return len(jobs) - number
        return 0

    def _retry_after(self) -> int:
        ahead = sum(job.size for job in self.waiting)
        turns = math.ceil((ahead + 1) / self.capacity.sequences)
        return max(1, min(60, round(turns * self.seconds_a_job)))

    # ---- the thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception:  # of our own making: the states may be half changed
                    _logger.exception("a step failed; its requests are answered 500")
                    self._fail_running(failed())
            self._fail_all(shutting_down())

    def _wait(self) -> bool:
        """Sleep until there is work; False when it is time to end."""
        with self.changed:
            while not (self.waiting or self.reading or self.rows):
                if not self.accepting:
                    return False
                self.changed.wait()
            return time.monotonic() < self.stop_at

    def _turn(self) -> None:
        self._drop()
        self._admit()
        self._read()
        self._step()

    def _drop(self) -> None:
        """Take out what nobody waits for, and what has taken too long."""
        now = time.monotonic()
        with self.changed:
            jobs = {*self.waiting, *self._jobs()}
            for job in jobs:
                if now > job.deadline and not job.cancelled:
                    job.fail(timed_out(self.settings.request_timeout))
                    job.cancelled = True
            if any(job.cancelled for job in jobs):
                self.waiting = deque(job for job in self.waiting if not job.cancelled)
                self.reading = deque(one for one in self.reading if not one.job.cancelled)
                self.joining = [pair for pair in self.joining if not pair[0].job.cancelled]
        self._keep(lambda row: not row.job.cancelled)

    def _keep(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the other rows, and their part of the cache: unlocked, as the event loop must not wait."""
        with self.changed:
            kept = [index for index, row in enumerate(self.rows) if wanted(row)]
            if len(kept) == len(self.rows):
                return
            self.rows = [self.rows[index] for index in kept]
        if not kept:
            self.cache = None
        elif self.cache is not None:
            rows = torch.tensor(kept, device=self.model.device)
            select_rows(self.cache, rows, [row.length for row in self.rows])

    def _admit(self) -> None:
        """First come, first served: a large job at the head waits for its places, and nobody overtakes."""
        with self.changed:
            while self.waiting and self._running() + self.waiting[0].size <= self.capacity.sequences:
                job = self.waiting.popleft()
                for number, prompt in enumerate(job.prompts):
                    tokens = torch.tensor([list(prompt)], dtype=torch.long, device=self.model.device)
                    self.reading.append(Reading(job, number, tokens))

    # ---- reading

    def _read(self) -> None:
        """Read about one chunk of prompts; those read whole join the batch."""
        budget = self.settings.prefill_chunk
        while self.reading and budget > 0:
            one = self.reading[0]
            part = one.tokens[:, one.done : one.done + self.settings.prefill_chunk]
            try:
                logits = self._read_part(one, part)
            except Exception:  # memory, or a prompt the model cannot take: the batch is not touched
                _logger.exception("a prompt could not be read; its request is answered 500")
                one.job.fail(failed())
                one.job.cancelled = True
                self._drop()
                continue
            budget -= part.shape[1]
            if one.done == one.tokens.shape[1]:
                self._begin(one, logits)
        self._join()

    def _read_part(self, one: Reading, part: torch.Tensor) -> torch.Tensor:
        if one.cache is None:
            state = one.job.state
            one.cache = self.model.make_cache() if state is None else state.fork()
        logits = self.model(part, past_key_values=one.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        one.done += part.shape[1]
        return logits

    def _begin(self, one: Reading, logits: torch.Tensor) -> None:
        """Choose the first tokens of a prompt that was read."""
        job, first = one.job, one.number * one.job.copies
        context = one.tokens[0, -8:].tolist()
        before = 0 if job.state is None else job.state.tokens.shape[1]
        rows = [
            Row(
                job, first + copy, before + one.tokens.shape[1],
                TextStream(self.tokenizer, context, job.stops), job.sampling.generator(first + copy),
            )
            for copy in range(job.copies)
        ]  # fmt: skip
        self._take(rows, logits.expand(len(rows), -1))
        going_on = [row for row in rows if not row.ended]
        self._note_ended(rows)
        assert one.cache is not None
        caches = copy_rows(one.cache, len(going_on)) if going_on else []
        with self.changed:
            self.reading.popleft()
            self.joining += zip(going_on, caches, strict=True)

    def _join(self) -> None:
        """Put the rows whose prompts were read into the batch."""
        if not self.joining:
            return
        caches = [cache for _, cache in self.joining]
        if self.cache is None:
            self.cache = caches.pop(0)
        if caches:
            append_rows(self.cache, caches)
        with self.changed:
            self.rows += [row for row, _ in self.joining]
            self.joining = []

    # ---- decoding

    def _step(self) -> None:
        """One token for every row."""
        if not self.rows:
            return
        assert self.cache is not None
        device = self.model.device
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        tokens = torch.tensor([[row.last] for row in self.rows], device=device)
        logits = self.model(
            tokens, past_key_values=self.cache, position_ids=lengths[:, None],
            attention_mask=padding_mask(self.cache, lengths), use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        for row in self.rows:
            row.length += 1
        self._take(self.rows, logits)
        ended = [row for row in self.rows if row.ended]
        if ended:
            self._note_ended(ended)
            self._keep(lambda row: not row.ended)

    def _take(self, rows: list[Row], logits: torch.Tensor) -> None:
        self.generated += len(rows)
        chosen = choose(logits, [(row.job.sampling, row.generator) for row in rows])
        for index, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            count = row.job.sampling.logprobs
            report: TokenLogprob | None = None
            if count is not None:
                report = logprob_of(logits[index], token, count)
            row.take(token, report)

    def _note_ended(self, rows: list[Row]) -> None:
        """Keep a running mean of how long jobs take, for Retry-After."""
        for job in {row.job for row in rows if row.job.ended}:
            taken = time.monotonic() - job.started
            self.seconds_a_job += 0.1 * (taken - self.seconds_a_job)

    # ---- failing

    def _fail_running(self, error: ApiError) -> None:
        with self.changed:
            jobs = self._jobs()
            self.reading.clear()
            self.joining, self.rows, self.cache = [], [], None
        for job in jobs:
            job.fail(error)

    def _fail_all(self, error: ApiError) -> None:
        with self.changed:
            self.accepting = False
            waiting = list(self.waiting)
            self.waiting.clear()
        self._fail_running(error)
        for job in waiting:
            job.fail(error)
