"""`equipoise serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.commands.failures import FAILED, UsageError, VerbError
from equipoise.commands.options import Branch, ConvertedModel, Reading
from equipoise.commands.output import progress, quieten, say

if TYPE_CHECKING:
    from equipoise.models.reading import PromptState


def serve_command(
    model: ConvertedModel,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Address to listen on; loopback unless asked.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 for any that is free.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What clients call the model.")
    ] = None,
    branch: Branch = "both",
    reading: Reading = "renormalised",
    state: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="NAME=FILE", help="Offer a saved text as model MODEL:NAME."),
    ] = None,
    context_length: Annotated[
        int | None,
        typer.Option("--context-length", metavar="N", min=2, help="Prompt and completion; the model's own."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of a completion, at most.")
    ] = 4096,
    max_sequences: Annotated[
        int, typer.Option("--max-sequences", metavar="N", min=1, help="Sequences at once, at most.")
    ] = 64,
    state_memory: Annotated[
        str, typer.Option("--state-memory", metavar="SIZE", help="For the states of all, such as 512MiB.")
    ] = "2GiB",
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Requests that may wait; then 429.")
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout", metavar="S", help="Seconds a request may take; then 504.")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option("--shutdown-timeout", metavar="S", min=0, help="To finish in after a signal.")
    ] = 30.0,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", metavar="FILE", help="Jinja, instead of the model's.")
    ] = None,
) -> None:
    """Serve a converted model over OpenAI's API: chat, completions, streams.

    \b
    equipoise serve out/ssd --port 8000
    equipoise serve out/ssd --branch linear --state-memory 512MiB --state book=states/book.safetensors
    """
    files = _states(state or [])
    _require_extra()
    quieten()
    from equipoise.models.branches import branches, mode_of
    from equipoise.models.load import load_tokenizer
    from equipoise.serve.app import Served
    from equipoise.serve.capacity import capacity_of
    from equipoise.serve.running import Server, bind, loopback_hosts, run
    from equipoise.serve.scheduler import Scheduler
    from equipoise.serve.settings import ServeSettings

    mode_of(branch, reading)  # a misspelt state is known before any weight is read
    limits: dict[str, Any] = {
        "max_tokens": max_tokens, "max_sequences": max_sequences, "state_memory": state_memory,
        "queue_size": queue, "request_timeout": request_timeout, "shutdown_timeout": shutdown_timeout,
    }  # fmt: skip
    ServeSettings(context_length=context_length or 2, **limits)
    bound = bind(host, port)
    try:
        loaded, tokenizer = _load(model), load_tokenizer(model)
        _prepare(tokenizer, model, chat_template)
        settings = ServeSettings(context_length=context_length or _positions(loaded), **limits)
        with branches(loaded, branch, reading=reading):
            texts = {key: _read_state(file, loaded) for key, file in files.items()}
            capacity = capacity_of(loaded, settings)
            served = Served(
                name or Path(model).name, Scheduler(loaded, tokenizer, settings, capacity), texts,
                loopback_hosts(bound),
            )  # fmt: skip
            address, number = bound.getsockname()[:2]
            where = f"http://{f'[{address}]' if ':' in address else address}:{number}/v1"

            def ready() -> None:
                console = progress()
                say(console, f"{', '.join(served.models())} (branches: {branch})")
                say(console, capacity.words(settings))
                if served.hosts is None:
                    say(console, "note: reachable from other machines, without a password.", style="yellow")
                say(console, f"serving on {where} (Ctrl-C ends it)")

            run(Server(served, ready), bound)
    finally:
        bound.close()


def _states(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in given:
        key, sign, file = one.partition("=")
        if not key or not sign or not file or key in found:
            raise UsageError(f"--state {one}: expected NAME=FILE, each name once.")
        found[key] = Path(file)
    return found


def _require_extra() -> None:
    try:
        import fastapi
        import uvicorn
    except ModuleNotFoundError as missing:
        raise VerbError(
            f'equipoise serve needs {missing.name}, which is not installed: pip install "equipoise[serve]"',
            FAILED,
        ) from None
    del fastapi, uvicorn


def _load(name: str) -> Any:
    from equipoise.models.load import load_model

    loaded = load_model(name)
    if not hasattr(loaded, "make_cache"):
        raise UsageError(
            f"{name}: expected a converted model, got an unconverted {loaded.config.model_type}. "
            "`transformers serve` serves those."
        )
    return loaded


def _prepare(tokenizer: Any, name: str, chat_template: Path | None) -> None:
    if not tokenizer.is_fast:
        raise UsageError(f"{name}: expected a tokenizer with a tokenizer.json, got a slow one.")
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {chat_template}: cannot be read ({error}).") from None


def _positions(model: Any) -> int:
    """The model's own context length."""
    known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if known is None:
        raise UsageError("--context-length: this model does not say how many tokens it was made for; set it.")
    return int(known)


def _read_state(file: Path, model: Any) -> PromptState:
    from equipoise.models.states import load_state

    return load_state(file, model)
