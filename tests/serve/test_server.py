"""The server as the real client sees it: answers, streams, limits, refusals."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from equipoise import read_prompt

from .conftest import NAME, Running, Serve

USER = [{"role": "user", "content": "the quick"}]


def greedy(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """What the model says alone."""
    tokens = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(tokens, max_new_tokens=count, do_sample=False)[0, tokens.shape[1] :]
    return tokenizer.decode(made)


def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def post(running: Running, path: str, body: bytes | str, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers of a request that the client would not send."""
    connection = http.client.HTTPConnection("127.0.0.1", int(running.url.split(":")[2].split("/")[0]))
    sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request("POST", path, body.encode() if isinstance(body, str) else body, sent)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read()), answer.headers
    connection.close()
    return found


# ---- answers


def test_completion_is_the_models_own(serve: Serve, model: Any, tokenizer: Any) -> None:
    client = serve().client()
    done = client.completions.create(model=NAME, prompt="the quick", max_tokens=12, temperature=0)
    expected = greedy(model, tokenizer, "the quick", 12)
    assert done.choices[0].text == expected
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert done.usage.completion_tokens == 12
    assert done.usage.prompt_tokens == len(tokenizer("the quick").input_ids)
    parts = list(
        client.completions.create(
            model=NAME, prompt=tokenizer("the quick").input_ids, max_tokens=12, temperature=0, stream=True
        )
    )
    assert "".join(part.choices[0].text for part in parts) == expected
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"


def test_chat_goes_through_the_template(serve: Serve, model: Any, tokenizer: Any) -> None:
    client = serve().client()
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    expected = greedy(model, tokenizer, text, 9)
    done = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_completion_tokens=9  # type: ignore[arg-type]
    )  # fmt: skip
    assert done.choices[0].message.content == expected
    assert done.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_tokens=9, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == expected
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 9


def test_several_prompts_and_choices(serve: Serve, model: Any, tokenizer: Any) -> None:
    client = serve().client()
    prompts = ["the quick", "def window(size):", "a"]
    done = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=6, temperature=0)
    assert [choice.index for choice in done.choices] == list(range(6))
    assert [c.text for c in done.choices] == [greedy(model, tokenizer, p, 6) for p in prompts for _ in "ab"]
    drawn = client.completions.create(model=NAME, prompt="a", n=4, max_tokens=8, seed=3, temperature=1.5)
    assert len({choice.text for choice in drawn.choices}) == 4
    again = client.completions.create(model=NAME, prompt="a", n=4, max_tokens=8, seed=3, temperature=1.5)
    assert [c.text for c in again.choices] == [c.text for c in drawn.choices]


def test_stop_strings_end_the_text_before_them(serve: Serve, model: Any, tokenizer: Any) -> None:
    client = serve().client()
    whole = greedy(model, tokenizer, "the quick", 30)
    stop = whole[5:8]
    for stream in (False, True):
        done = client.completions.create(
            model=NAME, prompt="the quick", max_tokens=30, temperature=0, stop=["zzzz", stop], stream=stream
        )
        parts = list(done) if stream else [done]
        assert "".join(p.choices[0].text for p in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_log_probabilities(serve: Serve, model: Any, tokenizer: Any) -> None:
    client = serve().client()
    done = client.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3  # type: ignore[arg-type]
    )  # fmt: skip
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content or []
    assert [len(entry.top_logprobs) for entry in content] == [3] * 4
    text = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        first = model(tokens).logits[0, -1].log_softmax(-1).max()
    assert content[0].logprob == pytest.approx(float(first), abs=1e-9)
    assert content[0].top_logprobs[0].logprob == content[0].logprob
    plain = client.completions.create(model=NAME, prompt="a", max_tokens=4, logprobs=2, temperature=0)
    assert plain.choices[0].logprobs is not None
    assert [len(top) for top in plain.choices[0].logprobs.top_logprobs or []] == [2] * 4


def test_models_and_health(serve: Serve) -> None:
    running = serve()
    client = running.client()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "equipoise"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; there is tiny"):
        client.models.retrieve("gpt")
    connection = http.client.HTTPConnection("127.0.0.1", int(running.url.split(":")[2].split("/")[0]))
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["sequences"] == 64
    connection.close()


def test_a_saved_state_is_a_model_of_its_own(serve: Serve, model: Any, tokenizer: Any) -> None:
    book = "the quick brown fox jumps\n" * 8
    state = read_prompt(model, tokenizer(book, return_tensors="pt").input_ids)
    running = serve(states={"book": state})
    client = running.client()
    assert [each.id for each in client.models.list()] == [NAME, f"{NAME}:book"]
    expected = greedy(model, tokenizer, book + "return", 8)
    for _ in range(2):
        done = client.completions.create(
            model=f"{NAME}:book", prompt="return", max_tokens=8, temperature=0, n=2
        )
        assert [choice.text for choice in done.choices] == [expected] * 2
        assert done.usage is not None
        assert done.usage.prompt_tokens == len(tokenizer("return").input_ids)
    with pytest.raises(openai.BadRequestError, match="expected max_tokens up to"):
        client.completions.create(model=f"{NAME}:book", prompt="return", max_tokens=500)


# ---- many at once


def test_64_streams_at_once(serve: Serve, model: Any, tokenizer: Any) -> None:
    running = serve(max_sequences=40, prefill_chunk=64)  # not all fit: the others wait for their turn
    client = running.client()
    texts = [f"def window{i}(size):" + " fox" * (i % 7) for i in range(64)]
    most = 0

    def ask(number: int) -> str:
        nonlocal most
        stream = client.completions.create(
            model=NAME, prompt=texts[number], max_tokens=3 + number % 7, temperature=0, stream=True
        )
        parts = list(stream)
        most = max(most, running.scheduler.status().running)
        assert parts[-1].choices[0].finish_reason == "length"
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    assert most <= 40
    for number in range(0, 64, 13):  # each as alone: float64, so that no rounding decides between two tokens
        assert found[number] == greedy(model, tokenizer, texts[number], 3 + number % 7)
    assert running.scheduler.status().running == 0
    assert running.scheduler.cache is None


# ---- limits


def test_a_full_queue_says_when_to_come_back(serve: Serve) -> None:
    running = serve(max_sequences=2, queue_size=1, slow=0.05)
    client = running.client()
    streams = [
        client.completions.create(model=NAME, prompt="a", max_tokens=200, stream=True) for _ in range(3)
    ]
    until(lambda: running.scheduler.status().waiting == 1)
    with pytest.raises(openai.RateLimitError, match="1 requests are waiting already") as refused:
        client.completions.create(model=NAME, prompt="a", max_tokens=2)
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert refused.value.code == "queue_full"
    for stream in streams:
        stream.close()
    until(lambda: running.scheduler.status().running == 0)
    assert client.completions.create(model=NAME, prompt="a", max_tokens=2).choices[0].text


def test_time_limit(serve: Serve) -> None:
    client = serve(request_timeout=0.3, slow=0.05, max_sequences=1).client(max_retries=2)
    started = time.monotonic()
    with pytest.raises(openai.APIStatusError, match=r"not finished within 0\.3s") as refused:
        client.completions.create(model=NAME, prompt="a", max_tokens=200)
    assert refused.value.status_code == 504
    assert time.monotonic() - started < 1.5  # not tried again
    with pytest.raises(openai.APIError, match=r"not finished within 0\.3s"):
        list(client.completions.create(model=NAME, prompt="a", max_tokens=200, stream=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "fox " * 600}, "context is 512 tokens, and the prompt has"),
        ({"prompt": "a", "max_tokens": 41}, "expected max_tokens up to 40, got 41"),
        ({"prompt": "a", "n": 65}, "expected at most 64 choices"),
        ({"prompt": ["a"] * 65}, "expected at most 64 choices"),
        ({"prompt": ""}, "expected a prompt of at least one token"),
        ({"prompt": [1, 300]}, "expected token ids below 300"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": 3}, "prompt: Input should be a valid string, or "),
        ({"prompt": "a", "temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"prompt": "a", "temperature": "1"}, "temperature: Input should be a valid number"),
        ({"prompt": "a", "temperature": True}, "temperature: Input should be a valid number"),
        ({"prompt": "a", "top_p": 0}, "top_p: Input should be greater than 0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "stop": ""}, "stop: String should have at least 1 character"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop: "),
        ({"prompt": "a", "logprobs": 6}, "logprobs: Input should be less than or equal to 5"),
        ({"prompt": "a", "echo": True}, "echo: is not offered by this server"),
        ({"prompt": "a", "presence_penalty": 1}, "presence_penalty: is not offered by this server"),
        ({"prompt": "a", "tempratur": 1}, "tempratur: there is no such field"),
        ({"prompt": "a", "stream": "yes"}, "stream: Input should be a valid boolean"),
        ({}, "prompt: Field required"),
    ],
)
def test_requests_beyond_the_limits(running: Running, fields: dict[str, Any], message: str) -> None:
    status, answer, _ = post(running, "/v1/completions", json.dumps({"model": NAME, **fields}))
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ([{"role": "robot", "content": "a"}], "messages.0.role: Input should be 'system'"),
        ([{"role": "user"}], "messages.0.content: Field required"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}], "Input should be 'text'"),
        ([{"role": "assistant", "content": "a"}], "a conversation begins with the user"),
    ],
)
def test_conversations_that_cannot_be_read(running: Running, messages: Any, message: str) -> None:
    status, answer, _ = post(
        running, "/v1/chat/completions", json.dumps({"model": NAME, "messages": messages})
    )
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(max_tokens=40, max_body=10_000)


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ("{", {}, 400, "the body is not valid JSON"),
        (b"\xff\xfe{}", {}, 400, "the body is not valid JSON"),
        ("[" * 5000, {}, 400, "pars"),
        ("[]", {}, 400, "expected a JSON object"),
        ("", {}, 400, "expected a JSON object"),
        ("{}", {"Content_Type": "text/plain"}, 400, "Content-Type: application/json"),
        ('{"model": "tiny", "prompt": "a", "temperature": NaN}', {}, 400, "finite number"),
        ('{"model": "tiny", "prompt": "\\ud800"}', {}, 400, "valid Unicode"),
        ('{"model": "gpt", "prompt": "a"}', {}, 404, "'gpt' is not served here; there is tiny"),
        ('{"prompt": "' + "a" * 20_000 + '"}', {}, 413, "at most 10,000 bytes"),
        ("{}", {"Host": "attacker.example"}, 403, "is not called 'attacker.example'"),
    ],
)
def test_bodies_that_are_none(
    running: Running, body: str | bytes, headers: dict[str, str], status: int, message: str
) -> None:
    found, answer, _ = post(running, "/v1/completions", body, **headers)
    assert found == status
    assert message in answer["error"]["message"]


def test_long_bodies_in_parts(running: Running) -> None:
    """No Content-Length to tell beforehand."""
    with socket.create_connection(("127.0.0.1", int(running.url.split(":")[2].split("/")[0]))) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"a" * 4096 + b"\r\n"
        )
        raw.sendall((b"1000\r\n" + b"a" * 4096 + b"\r\n") * 2 + b"0\r\n\r\n")
        assert b" 413 " in raw.recv(4096)


def test_unknown_paths_and_methods(running: Running) -> None:
    assert post(running, "/v1/embeddings", "{}")[:2] == (
        404,
        {
            "error": {
                "message": "there is no /v1/embeddings here.",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        },
    )
    status, answer, _ = post(running, "/v1/models", "{}")
    assert status == 405
    assert answer["error"]["message"] == "/v1/models does not take POST."


def test_without_a_chat_template(serve: Serve, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    client = serve().client()
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions") as refused:
        client.chat.completions.create(model=NAME, messages=USER)  # type: ignore[arg-type]
    assert refused.value.code == "no_chat_template"


# ---- clients that go, and the end


def test_clients_that_go_free_their_place(serve: Serve) -> None:
    running = serve(max_sequences=2, slow=0.02)
    client = running.client()
    staying = client.completions.create(model=NAME, prompt="a", max_tokens=60, temperature=0, stream=True)
    going = client.completions.create(model=NAME, prompt="b", max_tokens=400, stream=True)
    waiting = client.completions.create(model=NAME, prompt="c", max_tokens=400, stream=True)
    next(iter(going))
    until(lambda: running.scheduler.status().waiting == 1)
    waiting.close()  # still in the queue
    until(lambda: running.scheduler.status().waiting == 0)
    going.close()  # in the middle
    until(lambda: running.scheduler.status().running == 1)
    with pytest.raises(openai.APITimeoutError):  # and one that does not stream
        running.client(timeout=0.3).completions.create(model=NAME, prompt="d", max_tokens=400)
    until(lambda: running.scheduler.status().running <= 1)
    assert sum(bool(part.choices[0].finish_reason) for part in staying) == 1
    until(lambda: running.scheduler.status().running == 0)


def test_shutdown_finishes_what_was_accepted(serve: Serve) -> None:
    running = serve(max_sequences=2, slow=0.01, shutdown_timeout=20)
    client = running.client()
    streams = [
        client.completions.create(model=NAME, prompt="a", max_tokens=30, stream=True) for _ in range(5)
    ]
    running.server.should_exit = True
    until(lambda: not running.scheduler.accepting)
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        client.completions.create(model=NAME, prompt="a")
    for stream in streams:
        assert [part.choices[0].finish_reason for part in stream][-1] == "length"
    running.stop()


def test_shutdown_fails_what_takes_too_long(serve: Serve) -> None:
    running = serve(max_sequences=2, slow=0.05, shutdown_timeout=0.3)
    client = running.client()
    streams = [
        client.completions.create(model=NAME, prompt="a", max_tokens=400, stream=True) for _ in range(4)
    ]
    next(iter(streams[0]))
    running.server.should_exit = True
    for stream in streams:
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
    running.stop()
    assert not running.scheduler.thread.is_alive()


def test_a_failure_is_answered_and_survived(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = serve()
    client = running.client()
    with monkeypatch.context() as broken:
        broken.setattr("equipoise.serve.scheduler.padding_mask", lambda *arguments: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the server failed at this request"):
            client.completions.create(model=NAME, prompt="a", max_tokens=4)
    assert client.completions.create(model=NAME, prompt="a", max_tokens=4).choices[0].finish_reason
