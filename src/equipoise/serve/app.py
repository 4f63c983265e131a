"""The HTTP side: routes, what a request must be, and streams that notice when their client has gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from equipoise.models.reading import PromptState
from equipoise.serve.errors import ApiError, error_body
from equipoise.serve.guard import Guard
from equipoise.serve.jobs import Event, Job, Piece
from equipoise.serve.replies import DONE, Reply, event
from equipoise.serve.scheduler import Scheduler
from equipoise.serve.schema import NESTED, ChatRequest, CompletionRequest, GenerationRequest


@dataclass(frozen=True)
class Served:
    """What the server offers.

    Attributes:
        name: of the model.
        scheduler: runs it.
        states: saved prompts by name; asked for as the model ``NAME:STATE``.
        hosts: names a request may call this server by; None for any.
    """

    name: str
    scheduler: Scheduler
    states: Mapping[str, PromptState] = field(default_factory=dict[str, PromptState])
    hosts: frozenset[str] | None = None
    started: int = field(default_factory=lambda: int(time.time()))

    def models(self) -> list[str]:
        """Every name a request may ask for."""
        return [self.name, *(f"{self.name}:{state}" for state in self.states)]


class Answer:
    """The events of one job, on the event loop's side."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def deliver(self, event: Event) -> None:
        """Called by the scheduler's thread."""
        with suppress(RuntimeError):  # the loop was closed by a forced exit: nobody is left to read
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def take(self) -> list[Piece]:
        """Whatever has come since the last call, at least one piece.

        Raises:
            ApiError: the job failed.
        """
        events = [await self.queue.get()]
        while not self.queue.empty():
            events.append(self.queue.get_nowait())
        for one in events:
            if isinstance(one, ApiError):
                raise one
        return [one for one in events if isinstance(one, Piece)]


class EventStream(StreamingResponse):
    """A stream that gives its job up when the client goes, also before the first event."""

    def __init__(self, content: AsyncIterator[bytes], scheduler: Scheduler, job: Job) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.scheduler, self.job = scheduler, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.scheduler.cancel(self.job)


def make_app(served: Served) -> FastAPI:
    """The application."""
    app = FastAPI(title="equipoise", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limit=int(served.scheduler.settings.max_body), hosts=served.hosts)
    _add_errors(app)

    @app.get("/health")
    def health() -> Response:
        status = served.scheduler.status()
        body = {
            "status": "ok" if status.accepting else "shutting down", "running": status.running,
            "waiting": status.waiting, "sequences": status.capacity, "generated_tokens": status.generated,
            "state_bytes": status.capacity * served.scheduler.capacity.sequence_bytes,
        }  # fmt: skip
        return JSONResponse(body, 200 if status.accepting else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served, name) for name in served.models()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_name(served, name)
        return _model(served, name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(served, body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(served, body, request)

    return app


def _model(served: Served, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": served.started, "owned_by": "equipoise"}


def _check_name(served: Served, name: str) -> PromptState | None:
    if name not in served.models():
        raise ApiError(
            404, f"the model {name!r} is not served here; there is {', '.join(served.models())}.",
            param="model", code="model_not_found",
        )  # fmt: skip
    return served.states.get(name.removeprefix(f"{served.name}:"))


# ---- one request


async def _answer(served: Served, body: GenerationRequest, request: Request) -> Response:
    state = _check_name(served, body.model)
    prompts = await run_in_threadpool(_encode, served, body, continues=state is not None)
    answer = Answer()
    job = _job(served, body, prompts, state, answer)
    served.scheduler.submit(job)
    reply = Reply(
        body.model, served.scheduler.tokenizer, chat=isinstance(body, ChatRequest), choices=job.size,
        prompt_tokens=sum(map(len, prompts)), logprobs=body.logprob_count is not None,
    )  # fmt: skip
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(answer, reply, usage=usage), served.scheduler, job)
    return await _whole(served.scheduler, job, answer, reply, request)


async def _events(answer: Answer, reply: Reply, *, usage: bool) -> AsyncIterator[bytes]:
    begun = set[int]()
    try:
        while not reply.done:
            for piece in await answer.take():
                reply.add(piece)
                yield event(reply.chunk(piece, first=piece.index not in begun))
                begun.add(piece.index)
    except ApiError as error:  # the status was sent long ago
        yield event(error.body())
        return
    if usage:
        yield event(reply.usage_chunk())
    yield DONE


async def _whole(scheduler: Scheduler, job: Job, answer: Answer, reply: Reply, request: Request) -> Response:
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        while not reply.done:
            pieces = asyncio.ensure_future(answer.take())
            await asyncio.wait((pieces, gone), return_when=asyncio.FIRST_COMPLETED)
            if not pieces.done():
                pieces.cancel()
                return Response(status_code=499)  # nobody reads it
            for piece in pieces.result():
                reply.add(piece)
    finally:
        gone.cancel()
        scheduler.cancel(job)
    return JSONResponse(reply.whole())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _job(
    served: Served,
    body: GenerationRequest,
    prompts: list[list[int]],
    state: PromptState | None,
    answer: Answer,
) -> Job:
    """The job of a request, checked against every limit."""
    scheduler = served.scheduler
    settings, places = scheduler.settings, scheduler.capacity.sequences
    copies = body.n or 1
    if len(prompts) * copies > places:
        raise ApiError(
            400, f"expected at most {places} choices (prompts times n), got {len(prompts) * copies}: so many "
            "sequences fit at once.", param="n",
        )  # fmt: skip
    read = max(map(len, prompts)) + (0 if state is None else state.tokens.shape[1])
    room = settings.context_length - read
    if room < 1:
        raise ApiError(
            400, f"this server's context is {settings.context_length} tokens, and the prompt has {read}.",
            param="messages" if isinstance(body, ChatRequest) else "prompt", code="context_length_exceeded",
        )  # fmt: skip
    wanted = (body.max_completion_tokens if isinstance(body, ChatRequest) else None) or body.max_tokens
    limit = min(settings.max_tokens, room)
    if wanted is not None and wanted > limit:
        raise ApiError(
            400, f"expected max_tokens up to {limit}, got {wanted}: a completion may have "
            f"{settings.max_tokens}, and the context of {settings.context_length} holds the prompt's {read}.",
            param="max_tokens", code="context_length_exceeded",
        )  # fmt: skip
    default = limit if isinstance(body, ChatRequest) else min(16, limit)  # OpenAI's, both
    return Job(
        prompts=prompts, copies=copies, sampling=body.sampling(), stops=body.stops,
        max_tokens=wanted or default, ends=ends_of(scheduler.model), deliver=answer.deliver,
        deadline=time.monotonic() + settings.request_timeout, state=state,
    )  # fmt: skip


def ends_of(model: Any) -> frozenset[int]:
    """Token ids that end a text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _encode(served: Served, body: GenerationRequest, *, continues: bool) -> list[list[int]]:
    """The token ids of every prompt; without a start token where they continue a saved one."""
    tokenizer, chat = served.scheduler.tokenizer, isinstance(body, ChatRequest)
    where = "messages" if chat else "prompt"
    try:
        if isinstance(body, ChatRequest):
            found = [_encode_chat(tokenizer, body, continues=continues)]
        else:
            assert isinstance(body, CompletionRequest)
            found = [
                list(prompt) if isinstance(prompt, list)
                else tokenizer(prompt, add_special_tokens=not continues, verbose=False).input_ids
                for prompt in body.prompts
            ]  # fmt: skip
    except (UnicodeError, TypeError):  # lone surrogates: JSON can say them, text cannot hold them
        raise ApiError(400, "expected text that is valid Unicode.", param=where) from None
    size = served.scheduler.model.config.get_text_config(decoder=True).vocab_size
    for tokens in found:
        if not tokens:
            raise ApiError(400, "expected a prompt of at least one token, got none.", param=where)
        if max(tokens) >= size:
            raise ApiError(
                400,
                f"expected token ids below {size}, the vocabulary's size, got {max(tokens)}.",
                param=where,
            )
    return found


def _encode_chat(tokenizer: Any, body: ChatRequest, *, continues: bool) -> list[int]:
    if tokenizer.chat_template is None:
        raise ApiError(
            400, "this model has no chat template: use /v1/completions, or start the server with "
            "--chat-template.", param="messages", code="no_chat_template",
        )  # fmt: skip
    messages = [message.plain() for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from None
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if continues and tokens[:1] == [tokenizer.bos_token_id]:
        return tokens[1:]
    return tokens


# ---- errors


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return JSONResponse(error.body(), error.status_code, error.headers)
        words = {404: f"there is no {request.url.path} here.",
                 405: f"{request.url.path} does not take {request.method}."}  # fmt: skip
        message = words.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        param, message = explain(error.errors())
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "the server failed at this request; its log says why."), 500)


def explain(errors: Any) -> tuple[str | None, str]:
    """(field, message) of the first field with a mistake; alternatives are told together."""
    first = errors[0]
    if first["type"] == "json_invalid":
        said = first.get("ctx", {}).get("error", "not JSON")
        return None, f"the body is not valid JSON: {said} at character {first['loc'][-1]}."
    path = _path(first["loc"])
    if not path:
        return None, "expected a JSON object, sent as Content-Type: application/json."
    param = ".".join(path)
    if first["type"] == "extra_forbidden":
        return param, f"{param}: there is no such field."
    said = dict.fromkeys(
        error["msg"].removeprefix("Value error, ")
        for error in errors
        if _path(error["loc"])[: len(path)] == path
    )
    return param, f"{param}: {', or '.join(said)}."


def _path(location: tuple[int | str, ...]) -> list[str]:
    """A pydantic location without the names of the types that were tried on the way."""
    path = [part for part in location if part != "body"]
    return [
        str(part) for index, part in enumerate(path) if not index or isinstance(part, int) or part in NESTED
    ]
