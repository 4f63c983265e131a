"""A server in a thread of this process, on a tiny model in float64, and the real client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch

from equipoise import HybridConfig, hybridize
from equipoise.serve.app import Served
from equipoise.serve.capacity import capacity_of
from equipoise.serve.running import Server, bind, loopback_hosts
from equipoise.serve.scheduler import Scheduler
from equipoise.serve.settings import ServeSettings
from support import tiny_model, tiny_tokenizer

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a conversation begins with the user') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client would otherwise ask a proxy for the way to this machine."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def model() -> Any:
    """A converted Llama without an end token, so that lengths are known."""
    return hybridize(tiny_model("llama", vocab_size=300, dtype=torch.float64), HybridConfig(window=8))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@dataclass
class Running:
    """A server that listens."""

    server: Server
    thread: threading.Thread
    url: str

    @property
    def scheduler(self) -> Scheduler:
        return self.server.scheduler

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="-", **{"max_retries": 0, "timeout": 60, **settings})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


Serve = Callable[..., Running]


@pytest.fixture
def serve(model: Any, tokenizer: Any) -> Iterator[Serve]:
    """Start a server with these settings; it is stopped after the test."""
    started: list[Running] = []

    def start(*, states: dict[str, Any] | None = None, slow: float = 0.0, **settings: Any) -> Running:
        limits = ServeSettings(**{"context_length": 512, "shutdown_timeout": 5.0, **settings})
        scheduler = Scheduler(model, tokenizer, limits, capacity_of(model, limits))
        if slow:
            _slow_down(scheduler, slow)
        bound = bind("127.0.0.1", 0)
        listening = threading.Event()
        server = Server(Served(NAME, scheduler, states or {}, loopback_hosts(bound)), listening.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        assert listening.wait(30)
        started.append(Running(server, thread, f"http://127.0.0.1:{bound.getsockname()[1]}/v1"))
        return started[-1]

    yield start
    for running in started:
        running.stop()


def _slow_down(scheduler: Scheduler, seconds: float) -> None:
    """Steps take at least so long, as those of a large model do."""
    step, pause = scheduler._step, threading.Event()

    def slowed() -> None:
        pause.wait(seconds)
        step()

    scheduler._step = slowed  # type: ignore[method-assign]
