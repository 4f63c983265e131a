"""`equipoise state save`, `show` and `continue`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.bars import counted
from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.generate import encode, read_prompt, read_text, sampling_of, stream
from equipoise.commands.options import (
    Branch,
    ConvertedModel,
    DrawSeed,
    MaxNewTokens,
    PromptFile,
    Quiet,
    Reading,
    StateFile,
    Temperature,
    TextAsJson,
    TopP,
)
from equipoise.commands.output import progress, quieten, results, say, say_json

if TYPE_CHECKING:
    from equipoise.models.states import StateDescription

state_app = typer.Typer(
    help="""Read a long text once and keep the model's state, of constant size, in a file to go on from.

    \b
    equipoise state save out/ssd --file book.txt --output states/
    equipoise state continue out/ssd states/book.safetensors "Who is the narrator?"
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@state_app.command("save")
def save_command(
    model: ConvertedModel,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="PATH",
            help="A file *.safetensors, or a directory for NAME.safetensors.",
        ),
    ],
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="The text, UTF-8; - for stdin.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="The text itself.")] = None,
    branch: Branch = "both",
    reading: Reading = "renormalised",
    after: Annotated[
        Path | None,
        typer.Option("--after", metavar="STATE", help="Go on from this state, in its branch state."),
    ] = None,
    chunk: Annotated[
        int, typer.Option("--chunk", metavar="N", min=1, help="Tokens read at once; memory grows with it.")
    ] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print the description as JSON.")] = False,
) -> None:
    """Read a text once, and save the state it leaves.

    \b
    equipoise state save out/ssd --file book.txt --output states/
    equipoise state save out/ssd --file volume2.txt --after states/book.safetensors --output states/
    """
    if (file is None) == (text is None):
        raise UsageError("expected one text: either with --file or with --text.")
    content = text if text is not None else read_text(str(file), "--file")
    target = _target(output, file)
    quieten()
    from equipoise.models.branches import branches, mode_of
    from equipoise.models.load import load_tokenizer
    from equipoise.models.reading import read_prompt as read
    from equipoise.models.states import StateMode, describe_state, load_state, save_state

    mode = mode_of(branch, reading) if after is None else describe_state(after).mode.mode()
    StateMode.of(mode)  # softmax has no such state: known before the text is read
    loaded, tokenizer = _load(model), load_tokenizer(model)
    tokens = encode(tokenizer, content, loaded, continues=after is not None)
    try:
        with branches(loaded, mode), _reading(tokens.shape[1]) as report:
            before = None if after is None else load_state(after, loaded)
            done = read(loaded, tokens, chunk=chunk, after=before, progress=report)
        with told_when_full(target, "No part of the state is left there."):
            target.parent.mkdir(parents=True, exist_ok=True)
            described = save_state(target, done, loaded)
    except KeyboardInterrupt:
        raise VerbError("interrupted; no state was saved.", INTERRUPTED) from None
    _warn_of_length(loaded, described.tokens)
    _print(target, described, as_json)


@state_app.command("show")
def show_command(
    state: StateFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a state file holds: which model read how many tokens, in which branch state.

    \b
    equipoise state show states/book.safetensors
    """
    quieten()
    from equipoise.models.states import describe_state

    _print(state, describe_state(state), as_json)


@state_app.command("continue")
def continue_command(
    model: ConvertedModel,
    state: StateFile,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What follows the text.")] = None,
    prompt_file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: DrawSeed = 0,
    quiet: Quiet = False,
    as_json: TextAsJson = False,
) -> None:
    """Stream what follows a saved text and a prompt to stdout; only the prompt is read.

    The branch state is that of the file. The state stays as it is, for any number of prompts.

    \b
    equipoise state continue out/ssd states/book.safetensors "Who is the narrator?"
    """
    question = read_prompt(prompt, prompt_file)
    if not top_p > 0:
        raise UsageError(f"--top-p: expected a share above 0 and up to 1, got {top_p}.")
    quieten()
    from equipoise.models.branches import branches
    from equipoise.models.load import load_tokenizer
    from equipoise.models.states import describe_state, load_state

    described = describe_state(state)
    loaded, tokenizer = _load(model), load_tokenizer(model)
    try:
        with branches(loaded, described.mode.mode()):
            start = load_state(state, loaded)
            tokens = encode(tokenizer, question, loaded, continues=True)
            done = stream(
                loaded, tokenizer, tokens, limit=max_new_tokens, seed=seed,
                sampling=sampling_of(temperature, top_p), state=start, shown=not as_json,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise VerbError("interrupted.", INTERRUPTED) from None
    if as_json:
        new: Any = done.sequences[0, described.tokens + tokens.shape[1] :]
        say_json({
            "prompt": question, "text": tokenizer.decode(new, skip_special_tokens=True),
            "state_tokens": described.tokens, "prompt_tokens": int(tokens.shape[1]), "new_tokens": len(new),
            "state_bytes": described.state_bytes,
        })  # fmt: skip
    elif not quiet:
        say(
            progress(),
            f"went on from {described.tokens:,} tokens ({described.state_bytes:,} bytes of state); read "
            f"{tokens.shape[1]:,} more",
        )


def _target(output: Path, file: str | None) -> Path:
    if output.suffix == ".safetensors" and not output.is_dir():
        return output
    if output.is_file():
        raise UsageError(f"--output {output}: expected a directory or a file *.safetensors.")
    return output / f"{Path(file).stem if file not in (None, '-') else 'prompt'}.safetensors"


def _load(name: str) -> Any:
    from equipoise.models.load import load_model

    loaded = load_model(name)
    if not hasattr(loaded, "make_cache"):
        raise UsageError(
            f"{name}: expected a converted model, whose state is constant in size, got an unconverted "
            f"{loaded.config.model_type}. Convert it first (`equipoise convert`)."
        )
    return loaded


@contextmanager
def _reading(total: int) -> Generator[Callable[[int], None]]:
    """Progress of reading: a bar on a terminal, one line at the end elsewhere."""
    console, started = progress(), time.monotonic()
    with counted(console) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda count: bar.advance(task, count)
    taken = time.monotonic() - started
    say(console, f"read {total:,} tokens in {taken:.1f}s ({total / max(taken, 1e-9):,.0f} a second)")


def _warn_of_length(model: Any, tokens: int) -> None:
    known = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if known is not None and tokens > known:
        say(
            progress(),
            f"note: {tokens:,} tokens are more than the {known:,} positions this model was made for; it "
            "goes on, but how well is untested.",
            style="yellow",
        )


def _print(path: Path, described: StateDescription, as_json: bool) -> None:
    if as_json:
        typer.echo(described.model_dump_json(indent=2))
        return
    size = path.stat().st_size
    for name, value in (
        ("file", f"{path} ({size:,} bytes)"),
        ("tokens", f"{described.tokens:,} (SHA-256 {described.tokens_digest[:16]}…)"),
        ("state", f"{described.state_bytes:,} bytes, the same for any length"),
        ("branches", described.mode.words()),
        ("model", f"{described.model_name or described.model_type}, {described.dtype}"),
        ("", f"{described.model_type}, SHA-256 {described.model_digest[:16]}…"),
    ):
        say(results(), f"{name:<9} {value}")
