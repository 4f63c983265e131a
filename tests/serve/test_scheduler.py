"""Continuous batching: whatever joins and leaves, every row says what it would say alone."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from equipoise import HybridConfig, branches, hybridize
from equipoise.serve.capacity import Capacity, capacity_of
from equipoise.serve.errors import ApiError
from equipoise.serve.jobs import Event, Job, Piece
from equipoise.serve.sampling import Sampling
from equipoise.serve.scheduler import Scheduler
from equipoise.serve.settings import ServeSettings
from equipoise.settings import ConfigError
from support import random_tokens, tiny_model


class Collected:
    """What one job received."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()

    def deliver(self, event: Event) -> None:
        self.events.append(event)
        reasons = sum(isinstance(one, Piece) and one.reason is not None for one in self.events)
        if isinstance(event, ApiError) or reasons == self.choices:
            self.over.set()

    choices = 1

    def tokens(self, index: int = 0) -> list[int]:
        return [
            report.token
            for one in self.events
            if isinstance(one, Piece) and one.index == index
            for report in one.logprobs
        ]


def job_of(prompt: list[int], count: int, collected: Collected, *, copies: int = 1, **more: Any) -> Job:
    """A greedy job that reports its tokens."""
    collected.choices = copies
    settings: dict[str, Any] = {
        "prompts": [prompt], "copies": copies, "sampling": Sampling(temperature=0.0, logprobs=0), "stops": (),
        "max_tokens": count, "ends": frozenset[int](), "deliver": collected.deliver,
        "deadline": time.monotonic() + 600,
    }  # fmt: skip
    return Job(**{**settings, **more})


def scheduler_of(model: Any, tokenizer: Any, **limits: Any) -> Scheduler:
    settings = ServeSettings(**{"context_length": 512, **limits})
    return Scheduler(model, tokenizer, settings, capacity_of(model, settings))


@pytest.mark.parametrize(
    ("family", "hybrid", "state"),
    [
        ("llama", {"window": 8}, "both"),
        ("llama", {"window": 6, "sinks": 2, "layout": "terraced", "overlap": False}, "both"),
        ("llama", {"window": 8}, "linear"),
        ("llama", {"window": 8}, "softmax"),
        ("gemma3_text", {"window": 5}, "both"),
    ],
)
def test_every_row_as_alone(family: str, hybrid: dict[str, Any], state: str, tokenizer: Any) -> None:
    """Prompts longer than a chunk, rows that join and leave at every step; float64, so that no rounding
    decides between two tokens."""
    model = hybridize(tiny_model(family, vocab_size=300, dtype=torch.float64), HybridConfig(**hybrid))
    chance = random.Random(0)
    prompts = [random_tokens(1, chance.randint(1, 50), seed=s)[0].tolist() for s in range(8)]
    counts = [chance.randint(1, 14) for _ in prompts]
    with branches(model, state):
        scheduler = scheduler_of(model, tokenizer, max_sequences=3, prefill_chunk=16)
        found = [Collected() for _ in prompts]
        for prompt, count, collected in zip(prompts, counts, found, strict=True):
            scheduler.waiting.append(job_of(prompt, count, collected))
        scheduler.start()
        assert all(collected.over.wait(120) for collected in found)
        for prompt, count, collected in zip(prompts, counts, found, strict=True):
            tokens = torch.tensor([prompt])
            alone = model.generate(tokens, max_new_tokens=count, do_sample=False, eos_token_id=None)
            assert collected.tokens() == alone[0, tokens.shape[1] :].tolist()
    scheduler.drain(0.0)
    scheduler.thread.join(10)


def test_states_never_take_more_than_was_stated(model: Any, tokenizer: Any) -> None:
    memory = 60_000
    scheduler = scheduler_of(model, tokenizer, state_memory=memory, prefill_chunk=8)
    places = scheduler.capacity.sequences
    assert 2 <= places < 8
    seen = list[tuple[int, int]]()
    step = scheduler._step

    def watched() -> None:
        held = 0 if scheduler.cache is None else scheduler.cache.state_bytes()
        held += sum(one.cache.state_bytes() for one in scheduler.reading if one.cache is not None)
        seen.append((scheduler.status().running, held))
        step()

    scheduler._step = watched  # type: ignore[method-assign]
    found = [Collected() for _ in range(8)]
    for number, collected in enumerate(found):
        prompt = random_tokens(1, 5 + 9 * number, seed=number)[0].tolist()
        scheduler.waiting.append(job_of(prompt, 12, collected, copies=1 + number % 2))
    scheduler.start()
    assert all(collected.over.wait(120) for collected in found)
    assert max(running for running, _ in seen) == places
    assert max(held for _, held in seen) <= memory
    assert max(held for _, held in seen) == places * scheduler.capacity.sequence_bytes
    scheduler.drain(0.0)
    scheduler.thread.join(10)


def test_capacity_counts_what_grows(tokenizer: Any) -> None:
    model = hybridize(tiny_model("gemma3_text", dtype=torch.float64), HybridConfig(window=5))
    settings = ServeSettings(context_length=100)
    hybrid = capacity_of(model, settings)
    assert hybrid.token_bytes == 0
    assert capacity_of(model, ServeSettings(context_length=400)) == hybrid
    with branches(model, "softmax"):
        donor = capacity_of(model, settings)
    heads, size, full, local, window = 2, 8, 2, 1, 6
    assert donor == Capacity(
        local * window * heads * size * 16, full * heads * size * 16,
        (local * window + full * 100) * heads * size * 16, 64,
    )  # fmt: skip
    assert "at 100 tokens" in donor.words(settings)
    assert "whatever its length" in hybrid.words(settings)


def test_too_little_memory_is_refused(model: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"--state-memory: a sequence takes [\d,]+ bytes of state, got 1,000"
    ):
        capacity_of(model, ServeSettings(context_length=9, state_memory=1000))


def test_a_prompt_that_fails_is_alone(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(model, tokenizer)
    read = scheduler._read_part

    def fails(one: Any, part: torch.Tensor) -> torch.Tensor:
        if part.shape[1] == 13:
            raise RuntimeError("no memory")
        return read(one, part)

    monkeypatch.setattr(scheduler, "_read_part", fails)
    good, bad, other = Collected(), Collected(), Collected()
    scheduler.waiting.append(job_of([5, 6], 20, good))
    scheduler.waiting.append(job_of([7] * 13, 20, bad))
    scheduler.waiting.append(job_of([5, 6], 20, other))
    scheduler.start()
    assert all(one.over.wait(120) for one in (good, bad, other))
    assert isinstance(bad.events[0], ApiError)
    assert bad.events[0].status_code == 500
    assert good.tokens() == other.tokens()
    assert len(good.tokens()) == 20
    scheduler.drain(0.0)
    scheduler.thread.join(10)


def test_nothing_is_accepted_before_the_start_or_after_the_end(model: Any, tokenizer: Any) -> None:
    scheduler = scheduler_of(model, tokenizer)
    with pytest.raises(ApiError, match="503"):
        scheduler.submit(job_of([5], 2, Collected()))
    scheduler.start()
    late = Collected()
    scheduler.drain(10.0)
    with pytest.raises(ApiError, match="503"):
        scheduler.submit(job_of([5], 2, late))
    scheduler.thread.join(10)
    assert not scheduler.thread.is_alive()


def test_end_tokens_are_not_text(model: Any, tokenizer: Any) -> None:
    scheduler = scheduler_of(model, tokenizer)
    first, second = Collected(), Collected()
    scheduler.start()
    scheduler.submit(job_of([5, 6], 12, first))
    assert first.over.wait(120)
    tokens = first.tokens()
    end = tokens[4]
    scheduler.submit(job_of([5, 6], 12, second, ends=frozenset([end])))
    assert second.over.wait(120)
    expected = tokens[: tokens.index(end)]
    text = "".join(one.text for one in second.events if isinstance(one, Piece))
    assert text == tokenizer.decode(expected)
    assert second.events[-1].reason == "stop"  # type: ignore[union-attr]
    scheduler.drain(0.0)
    scheduler.thread.join(10)
