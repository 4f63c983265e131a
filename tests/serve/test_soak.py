"""`equipoise serve` as a process of its own: signals, and 64 streams for minutes with flat memory."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from equipoise import HybridConfig, hybridize
from support import tiny_model, tiny_tokenizer

SECONDS = float(os.environ.get("EQUIPOISE_SOAK_SECONDS", "120"))
"""How long the soak lasts; 600 by hand."""
STREAMS = 64
SPEED_UP = 8
"""Tokens a second of 64 streams together, as a multiple of one alone."""
GROWTH = 24 << 20
"""Bytes that memory may grow in the second half: allocators and the interpreter are never quite still."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21M parameters: large enough that one step of one row is bound by reading the weights, as with real
    models, and small enough for a test."""
    place = tmp_path_factory.mktemp("models") / "soak"
    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 512, "num_hidden_layers": 8, "head_dim": 32,
        "intermediate_size": 1536, "max_position_embeddings": 4096, "initializer_range": 0.05,
    }  # fmt: skip
    hybrid = HybridConfig(window=16, feature_multiple=1, map_heads="key_value")
    hybridize(tiny_model("llama", **shape), hybrid).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@dataclass
class Process:
    """The command, running."""

    running: subprocess.Popen[str]
    url: str
    said: list[str]

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key="-", max_retries=0, timeout=120)

    def generated(self) -> int:
        """Tokens since the start, as the server counts them."""
        with urllib.request.urlopen(self.url.replace("/v1", "/health")) as answer:
            return int(json.loads(answer.read())["generated_tokens"])

    def resident(self) -> int:
        """Bytes of memory that the process has in use."""
        pages = int(Path(f"/proc/{self.running.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def process(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setenv("NO_PROXY", "*")
    command = [
        sys.executable,
        "-m",
        "equipoise",
        "serve",
        str(model),
        "--port",
        "0",
        "--shutdown-timeout",
        "20",
    ]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert running.stderr is not None
    said = list[str]()
    for line in running.stderr:
        said.append(line)
        if found := re.search(r"serving on (\S+)", line):
            break
    else:
        pytest.fail("".join(said))
    listener = threading.Thread(target=lambda: said.extend(running.stderr or ()))
    listener.start()
    yield Process(running, found[1], said)
    running.kill()
    running.wait()
    listener.join()
    running.stderr.close()


@dataclass
class Tally:
    """What came of all requests."""

    tokens: int = 0
    finished: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list[str])


async def one_stream(client: openai.AsyncOpenAI, tally: Tally, tokens: int, *, leave: bool = False) -> None:
    """One request; every token that was promised has to come, unless the client goes."""
    words = "the quick brown fox jumps " * random.Random(tokens).randint(1, 5)
    stream = await client.completions.create(
        model="soak", prompt=words, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
    )
    used, reason = 0, None
    async for part in stream:
        if part.choices and part.choices[0].finish_reason:
            reason = part.choices[0].finish_reason
        if part.usage is not None:
            used = part.usage.completion_tokens
        if leave:
            await stream.close()
            tally.left += 1
            return
    tally.tokens += used
    tally.finished += 1
    if (used, reason) != (tokens, "length"):
        tally.wrong.append(f"{used} of {tokens} tokens, {reason}")


async def streams(process: Process, count: int, seconds: float) -> tuple[Tally, float]:
    """Keep so many streams busy for so long; what came of them, and tokens a second.

    The rate is that of the time in which all are busy: not of the first second, nor of the end, when some
    have nothing left to ask.
    """
    client, tally = process.client(), Tally()
    started = time.monotonic()

    async def measure() -> float:
        counts = list[tuple[float, int]]()
        for wait in (1.0, seconds - 1.5):
            await asyncio.sleep(wait)
            counts.append((time.monotonic(), await asyncio.to_thread(process.generated)))
        (before, first), (after, last) = counts
        return (last - first) / (after - before)

    async def worker(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() - started < seconds:
            tokens = chance.randint(64, 192)
            await one_stream(client, tally, tokens, leave=count > 1 and chance.random() < 0.05)

    rate, *_ = await asyncio.gather(measure(), *(worker(number) for number in range(count)))
    await client.close()
    return tally, float(rate)


def alone(process: Process) -> float:
    """Tokens a second of one stream."""
    return asyncio.run(streams(process, 1, max(5.0, SECONDS / 24)))[1]


def test_64_streams(process: Process, capsys: pytest.CaptureFixture[str]) -> None:
    """No request is lost, memory is flat, and 64 streams are many times as fast as one."""
    asyncio.run(streams(process, STREAMS, 5))  # warm: allocators, pools, kernels
    before = alone(process)
    memory = list[int]()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            memory.append(process.resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tally, together = asyncio.run(streams(process, STREAMS, SECONDS))
    ended.set()
    watcher.join()
    one = (before + alone(process)) / 2  # the machine may be busier at one end than at the other
    half = len(memory) // 2
    growth = max(memory[half:]) - max(memory[:half])
    with capsys.disabled():
        print(
            f"\n{SECONDS:.0f}s: {tally.finished} requests finished, {tally.left} left by their clients, "
            f"{len(tally.wrong)} wrong; {together:,.0f} tokens/s against {one:,.0f} alone "
            f"({together / one:.1f}x); {max(memory) / 2**20:,.0f} MiB, growth {growth / 2**20:+.1f} MiB"
        )
    assert not tally.wrong
    assert tally.finished >= STREAMS
    assert growth < GROWTH
    assert together >= SPEED_UP * one
    assert process.running.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_when_all_is_answered(process: Process, number: signal.Signals) -> None:
    async def run() -> Tally:
        client, tally = process.client(), Tally()
        begun = [asyncio.ensure_future(one_stream(client, tally, 60)) for _ in range(16)]
        await asyncio.sleep(0.7)
        process.running.send_signal(number)
        results = await asyncio.gather(*begun, return_exceptions=True)
        # a connection that was not accepted any more is no lost request
        assert all(
            r is None or isinstance(r, (openai.APIConnectionError, openai.InternalServerError))
            for r in results
        )
        await client.close()
        return tally

    tally = asyncio.run(run())
    assert not tally.wrong
    assert tally.finished > 0
    assert process.running.wait(30) == 0
    assert "Traceback" not in "".join(process.said)


def test_a_taken_port_is_said_before_the_model_is_loaded(process: Process, model: Path) -> None:
    port = re.findall(r":(\d+)/", process.url)[0]
    command = [sys.executable, "-m", "equipoise", "serve", str(model), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another --port" in done.stderr
